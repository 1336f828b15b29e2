"""The mathematics of adapters, and the modules that hold their parameters.  Nothing of ours above rules."""
