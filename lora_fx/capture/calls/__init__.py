"""A call: its arguments, the objects among them, the state around it, and why it cannot be captured."""
