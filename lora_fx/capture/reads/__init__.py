"""What a forward looked at apart from its arguments, and how a guard sees that it is still the same."""
