"""Other people's LoRA, found by its structure and folded.  Nothing imports this folder: it can be detached."""
