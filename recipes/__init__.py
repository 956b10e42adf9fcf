"""Recipes shipped with the toolkit, `<model>/<method>.yaml`; found by name through `importlib.resources`."""
