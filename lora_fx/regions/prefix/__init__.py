"""Blocks that nothing trained precedes: their output, kept for data that comes again."""
