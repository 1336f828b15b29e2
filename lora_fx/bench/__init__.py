"""What a training step with adapters costs, beside the frozen base, PEFT and full fine-tuning: counted and timed.

`run.bench` measures a model by rules and returns a `report.Report`; the command line's verb and the project's own table
are made of it.
"""

from lora_fx.bench.analytic import Linear
from lora_fx.bench.counters import saved_bytes
from lora_fx.bench.report import BenchReport
from lora_fx.bench.run import BenchOptions, bench

__all__ = ["BenchOptions", "BenchReport", "Linear", "bench", "saved_bytes"]
