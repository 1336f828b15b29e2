"""Adapters on weights that code reads by name, without a layer that is called."""
