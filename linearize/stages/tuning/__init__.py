"""What stages share that train chosen tensors or adapters of the whole model end to end."""
