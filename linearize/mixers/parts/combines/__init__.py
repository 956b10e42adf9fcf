"""Ways to combine the window and the recurrent branch. File name = what recipes call it."""
