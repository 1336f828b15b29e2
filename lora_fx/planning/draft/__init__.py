"""A first rule file for a model: what it has, what people adapt of it, what that costs.  No torch here."""
