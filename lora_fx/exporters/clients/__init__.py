"""What runs in the subprocess in which an export is verified: the function `work` of a file.

Imports nothing else of lora_fx, so that the real client stands alone with what was written.
"""
