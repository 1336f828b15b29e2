"""A graph read as mathematics: sums of matrix chains, in which a LoRA is seen."""
