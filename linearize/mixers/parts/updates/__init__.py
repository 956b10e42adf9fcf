"""Updates: how a token is written into the recurrent state and read from it. File name = what recipes call it."""
