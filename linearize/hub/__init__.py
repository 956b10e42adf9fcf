"""The Hugging Face Hub: what is published of a checkpoint, its model card, and what goes wrong on the way."""
