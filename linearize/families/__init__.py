"""Model families: the only place that knows how a Hugging Face architecture projects heads; file name = `model_type`."""
