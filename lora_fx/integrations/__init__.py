"""Parts for other libraries: nothing else of lora_fx needs them.

pretrained    what trainers call on an adapted transformers model
trainer       callbacks of the transformers Trainer: checkpoints of other models, records; needs transformers
trl           TRL's trainers with the model's own base as their reference
lightning     callbacks of Lightning: adapter-only checkpoints, records; needs lightning
"""
