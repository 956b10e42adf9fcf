"""Measurements of a model: loss on text, synthetic recall, lm-evaluation-harness tasks, and their tables."""
