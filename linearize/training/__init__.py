"""One training loop for every stage, its optimiser, its data order and its checkpoints."""
