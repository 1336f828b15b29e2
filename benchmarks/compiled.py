"""What a compiled training step with adapters costs: `python benchmarks/compiled.py`; times are of this machine.

`optimise=["compile"]` beside the frozen base and PEFT, both handed to torch.compile as a whole; rank 8 on all linear
layers, 512 tokens, 2 layers and no head, as in training.py.  Times are over the compiled frozen base's, medians of
paired ratios as `lora_fx.bench` measures.  The first step is that of all 12 layers, in a process of its own with an
empty cache, from the model in memory: planning, adapting, compiling, and both passes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import training
from lora_fx.api import apply
from lora_fx.bench.counters import saved_bytes
from lora_fx.bench.peer import check_parity, peft_model, peft_subject
from lora_fx.bench.subjects import AGAIN, LB, OURS, PEFT, FrozenBase, Subject, copy_adapters
from lora_fx.bench.timing import fit, summarised, timed
from tests.support.performance import rows_between, told

HEADS = (
    "model", "frozen base, eager", "lora_fx, eager", "lora_fx, compile", "PEFT, compiled", "lora_fx over PEFT",
    "kept", "first step", "PEFT's", "A/A",
)  # fmt: skip
COMPILED = "lora_fx, compile"


def _compiled(subject: Subject, name: str) -> Subject:
    """Return a subject whose model is compiled as a whole."""
    whole: Any = torch.compile(subject.model)
    return Subject(name, whole, subject.sample, subject.leaf)


def _subjects(base: FrozenBase, rules: dict[str, Any]) -> list[Subject]:
    ours = base.adapted(OURS, rules)
    tuned = apply(base.model, rules, base.sample, optimise=["compile"])
    copy_adapters(ours.model, tuned)
    mine, theirs = base.subject(COMPILED, tuned), peft_subject(base, ours.model)
    check_parity(ours, theirs)
    check_parity(ours, mine)
    frozen = [_compiled(base.frozen(LB), LB), _compiled(base.frozen(AGAIN), AGAIN), base.frozen("eager")]
    return [*frozen, ours, mine, _compiled(theirs, PEFT)]


def _rules(model: training.Model) -> dict[str, Any]:
    ((_, rule, _),) = model.configs(["all8"])
    return {"version": 1, "rules": [rule]}


def _steps(model: training.Model, options: argparse.Namespace) -> list[str]:
    """Return the cells of a model that are about steps, and last the control."""
    whole = model.base(training.Sizes(options.layers, options.width, whole=False))
    base = FrozenBase.of(whole, model.sample(whole, options.tokens))
    subjects = _subjects(base, _rules(model))
    for subject in subjects:
        subject.step()
    steps = {subject.name: subject.step for subject in subjects}
    timing = fit(lambda: summarised(timed(steps, options.rounds), LB, AGAIN), options.attempts)
    kept = [saved_bytes(subject.forward, subject.own()) for subject in subjects if subject.name in (COMPILED, PEFT)]
    times = [timing.ratios[name] for name in ("eager", OURS, COMPILED, PEFT)]
    over = f"{times[2].ratio / times[3].ratio:.3f}"
    control = "void" if timing.void else f"{timing.control.ratio:.3f}"
    return [*(ratio.text() for ratio in times), over, f"{kept[0] / kept[1]:.2f}", control]


def first_step(model: training.Model, by: str, options: argparse.Namespace) -> float:
    """Return the seconds from a model of full depth in memory to the end of its first step."""
    base = model.base(training.Sizes(options.depth, options.width, whole=False)).train()
    sample = model.sample(base, options.tokens)
    tuned = apply(base, _rules(model), sample, backend="modules") if by == PEFT else nn.Identity()
    started = time.perf_counter()
    ready: Any
    if by == PEFT:
        ready = torch.compile(peft_model(base, tuned).train())
    else:
        ready = apply(base, _rules(model), sample, optimise=["compile"]).train()
    ready(*sample.args, **sample.kwargs)[0].square().mean().backward()
    return time.perf_counter() - started


def _first(name: str, by: str, options: argparse.Namespace) -> float:
    """Return what `first_step` measures in a process of its own, whose compiler has no cache."""
    sizes = [f"--{word}={getattr(options, word)}" for word in ("depth", "tokens", "width") if getattr(options, word)]
    with tempfile.TemporaryDirectory() as folder:
        around = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
        words = [sys.executable, __file__, "--models", name, "--first-by", by, *sizes]
        ran = subprocess.run(words, env=around, check=True, capture_output=True, text=True)
    return float(ran.stdout.split()[-1])


def row(name: str, options: argparse.Namespace) -> tuple[str, ...]:
    """Return the line of the table of one model."""
    model = training.MODELS[name]
    print(model.name, file=sys.stderr, flush=True)
    *steps, control = _steps(model, options)
    seconds = [_first(name, by, options) for by in (COMPILED, PEFT)] if options.depth else []
    return (model.name, *steps, *([f"{spent:.0f} s" for spent in seconds] or ["", ""]), control)


def _with_others(rows: Sequence[tuple[str, ...]], page: Path | None) -> list[tuple[str, ...]]:
    """Return the lines with those of a page that are about other models before them."""
    measured = {line[0] for line in rows}
    known = rows_between(page.read_text(encoding="utf-8"), "compiled") if page is not None else []
    return [HEADS, *(line for line in known if line[0] not in measured), *rows]


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", nargs="+", choices=training.MODELS, default=["llama", "bert", "gpt2"])
    asked.add_argument("--rounds", type=int, default=20)
    asked.add_argument("--attempts", type=int, default=10, help="how often a void run is repeated")
    asked.add_argument("--layers", type=int, default=2)
    asked.add_argument("--depth", type=int, default=12, help="layers for the first step; 0: it is not measured")
    asked.add_argument("--width", type=int, help="another one: to try the command")
    asked.add_argument("--tokens", type=int, default=512)
    asked.add_argument("--first-by", choices=(COMPILED, PEFT), help="print the seconds to one first step, and end")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    options = asked.parse_args(words)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.first_by:
        print(first_step(training.MODELS[options.models[0]], options.first_by, options))
        return
    rows = [row(name, options) for name in options.models]
    told(options.write, "compiled", _with_others(rows, options.write))


if __name__ == "__main__":
    main()
