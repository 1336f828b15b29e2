"""Which weights of a model are used how, and so what can be adapted."""
