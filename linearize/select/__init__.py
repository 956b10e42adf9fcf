"""Ways to choose the layers that keep their softmax attention; file name = key in a recipe's `layers`."""
