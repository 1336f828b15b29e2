"""Base, adapter and dropout of one or more layers as one differentiable operation."""
