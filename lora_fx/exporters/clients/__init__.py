"""What runs in the subprocess in which an export is verified: `python -m lora_fx.exporters.clients.NAME FOLDER`.

Imports nothing else of lora_fx, so that the real client stands alone with what was written.
"""
