"""Other people's LoRA, found by its structure and folded.  Nothing but api and cli imports this folder."""
