"""Parts for other libraries: nothing else of lora_fx needs them.

pretrained    what trainers call on an adapted transformers model
trainer       adapter-only checkpoints of the transformers Trainer for other models; needs transformers
"""
