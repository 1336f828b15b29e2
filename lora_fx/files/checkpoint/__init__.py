"""Adapters merged into a checkpoint on disk; no model object is made."""
