"""Architectures of transformers that converted models can be exported as, a file each, named after the `model_type`."""
