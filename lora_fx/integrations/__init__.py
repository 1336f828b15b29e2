"""Parts for other libraries; each file needs the library that it is for, and nothing else of lora_fx needs it.

trainer    adapter-only checkpoints of the transformers Trainer
"""
