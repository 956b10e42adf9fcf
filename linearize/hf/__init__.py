"""What makes a converted model an ordinary Hugging Face model: configuration, cache, loading and export."""
