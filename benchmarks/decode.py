"""What unmerged adapters cost where tokens are decoded: `python benchmarks/decode.py`; times are of this machine.

One linear, and a Llama of one layer with adapters on all its linears, called with 1 and with 8 rows without gradients:
median of paired ratios to the base's own module, as `lora_fx.bench` measures.  A merged model is the base with other
values, and takes its time.  Calls are repeated within a measurement, as one alone is too short for a clock.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaModel

import lora_fx
from lora_fx.bench.peer import peft_model
from lora_fx.bench.subjects import SPREAD, copy_adapters
from lora_fx.bench.timing import Timing, fit, summarised, timed
from lora_fx.models.samples import Sample
from tests.support.performance import told

RANK = 8
RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": RANK}}]}
BASE, AGAIN = "module", "module again"
FORMS = {
    "modules": "modules",
    "graph": "a graph around it",
    "whole": "a GraphModule",
    "PEFT": "PEFT",
    "merged": "merged",
}
"""Names of the forms, and what the table calls them."""


@dataclass(frozen=True, slots=True)
class Case:
    """A model that is called with a few rows."""

    name: str
    model: nn.Module
    sample: Sample

    def forms(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield (name, call) of every form of the model; the first two are the base."""
        tuned = self._adapted("auto")
        modules = self._adapted("modules")
        copy_adapters(tuned, modules)
        yield from ((name, self._call(self.model)) for name in (BASE, AGAIN))
        yield "modules", self._call(modules)
        yield "graph", self._call(tuned)
        if isinstance(self.model, nn.Sequential):
            whole = lora_fx.apply(fx.symbolic_trace(self.model), RULES, self.sample)
            copy_adapters(tuned, whole)
            yield "whole", self._call(whole)
        yield "PEFT", self._call(peft_model(self.model, modules).eval())
        yield "merged", self._call(lora_fx.merge(tuned))

    def _adapted(self, backend: lora_fx.api.ChosenBackend) -> nn.Module:
        tuned = lora_fx.apply(self.model, RULES, self.sample, backend)
        for name, parameter in tuned.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter, std=SPREAD)
        return tuned

    def _call(self, model: nn.Module) -> Callable[[], object]:
        args, kwargs = self.sample.args, self.sample.kwargs
        return lambda: model(*args, **kwargs)


def linear(width: int, rows: int) -> Case:
    """Return one linear layer, square."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width)).eval().requires_grad_(False)
    return Case(f"linear, width {width}", model, lora_fx.call(torch.randn(rows, width)))


def llama(width: int, rows: int) -> Case:
    """Return a Llama of one layer, called with a token for each row."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1, num_attention_heads=width // 64,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    model = LlamaModel(config).eval().requires_grad_(False)
    return Case(f"Llama layer, width {width}", model, lora_fx.call(input_ids=torch.randint(0, 1000, (rows, 1))))


def measured(case: Case, rounds: int, milliseconds: float, attempts: int) -> Timing:
    """Return the ratios of all forms to the base's module, of the first run that is not void."""
    forms = dict(case.forms())
    times = _repeats(forms[BASE], milliseconds / 1000)
    steps = {name: _repeated(call, times) for name, call in forms.items()}
    return fit(lambda: summarised(timed(steps, rounds), BASE, AGAIN), attempts)


def _repeats(call: Callable[[], object], seconds: float) -> int:
    """Return how many calls take so long."""
    number, spent = 1, 0.0
    while spent < seconds / 4:
        number *= 2
        started = time.perf_counter()
        _repeated(call, number)()
        spent = time.perf_counter() - started
    return max(1, round(number * seconds / spent))


def _repeated(call: Callable[[], object], number: int) -> Callable[[], None]:
    def step() -> None:
        with torch.no_grad():
            for _ in range(number):
                call()

    return step


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--rounds", type=int, default=40)
    asked.add_argument("--attempts", type=int, default=10, help="how often a void run is repeated")
    asked.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    asked.add_argument("--linear", type=int, nargs="*", default=[768, 2048], help="widths")
    asked.add_argument("--llama", type=int, nargs="*", default=[512], help="widths")
    asked.add_argument("--milliseconds", type=float, default=20, help="of one measurement of the base")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    torch.set_num_threads(1)
    table = [("model", "rows", *FORMS.values(), "A/A")]
    for make, widths in ((linear, options.linear), (llama, options.llama)):
        for width, rows in itertools.product(widths, options.rows):
            case = make(width, rows)
            timing = measured(case, options.rounds, options.milliseconds, options.attempts)
            table.append((case.name, str(rows), *_cells(timing)))
            print(*table[-1], sep="  ", file=sys.stderr, flush=True)
    told(options.write, "decode", table)


def _cells(timing: Timing) -> Iterator[str]:
    """Yield the medians, and the control; no time of a void run is told."""
    for form in FORMS:
        yield f"{timing.ratios[form].ratio:.3f}" if form in timing.ratios and not timing.void else ""
    yield "void" if timing.void else f"{timing.control.ratio:.3f}"


if __name__ == "__main__":
    main()
