"""Adapters in files, in PEFT's format."""
