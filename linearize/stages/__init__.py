"""Training stages: each file is one, named as recipes name it; all run on `linearize.training.loop`."""
