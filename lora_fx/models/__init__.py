"""What a model is to this package: its layers, tensors, ties, samples, and a structural copy of it."""
