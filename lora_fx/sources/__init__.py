"""What comes from others is read here: files of bounded size, JSON, and JSON as dataclasses.  Knows nothing of LoRA."""
