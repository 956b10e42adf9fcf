"""Decays: how fast the recurrent state forgets. File name = what recipes call it."""
