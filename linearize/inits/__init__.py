"""Initialisation of new tensors, declared by the mixers that own them."""
