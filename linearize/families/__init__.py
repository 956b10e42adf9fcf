"""Model families: the only place that knows how an architecture projects heads; file name = `model_type`."""
