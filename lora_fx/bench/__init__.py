"""What a training step with adapters costs, beside the frozen base, PEFT and full fine-tuning: counted and timed.

`run.bench` measures a model by rules and returns a `report.Report`; the command line's verb and the project's own table
are made of it.
"""
