"""Probes: one measurement a file, whose name is what users type."""
