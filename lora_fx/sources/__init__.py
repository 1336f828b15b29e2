"""What comes from others is read here: files of bounded size, JSON, and JSON as dataclasses.

What comes with the package is found here too.  Knows nothing of LoRA.
"""
