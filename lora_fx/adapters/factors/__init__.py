"""A, B and DoRA's lengths: what they compute, their first values, and the modules that hold them."""
