"""Synthetic tasks: puzzles written from a seed, fitted to exact lengths, and scored by generation and likelihood."""
