"""Other programs that serve converted models."""
