"""Replacements for softmax attention; the name of a file is the name that a recipe uses."""
