"""How long a user waits before the first step: `python benchmarks/wait.py`; times are of this machine.

Seconds of processor time of a forward of the example inputs, of `plan` and `apply`, of the module backend and of PEFT's
`get_peft_model`; and how often the model ran, whole and only to show what its blocks are called with.  Each model
is made in a process of its own, after a small one of the same class, so that imports are not measured; what that one
has captured is forgotten.  With `--next`, what is done for the first model of a class, the next one and that
once more: how often a block is captured, a graph compared with a forward, and the model run; how many functions written
in Python are called, in thousands, a generator counting each time that it goes on; and the FLOPs of products, attention
and convolutions, backward passes included, over those of one forward of the inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lora_fx
from lora_fx.discovery import study
from lora_fx.discovery.looks import LOOKS
from lora_fx.models.samples import Sample, samples_for
from lora_fx.models.torch_internals import function_modes
from lora_fx.regions import checking, learning, survey
from lora_fx.regions.checking import Replay
from lora_fx.regions.known import KNOWN
from lora_fx.regions.thin import ThinLinears
from tests.support.performance import told

T = TypeVar("T")
HEAD = ("model", "inputs", "forward", "plan", "apply", "over forward", "modules", "PEFT", "runs whole", "shows")
NEXT = ("model", "inputs", "which", "captures", "compared", "runs whole", "shows", "Python calls", "FLOPs over forward")


@dataclass(frozen=True, slots=True)
class Case:
    """A model and what it is adapted with."""

    name: str
    kind: type[Any]
    config: Any
    inputs: tuple[int, int] | None
    """Rows and tokens; None: none are given."""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def model(self, small: bool = False) -> nn.Module:
        """Return the model with random weights; its class counts its runs."""
        torch.manual_seed(0)
        config = copy.deepcopy(self.config)
        if small:
            config.num_hidden_layers = 2
            config.layer_types = (getattr(config, "layer_types", None) or [])[:2] or None
        counted = type(self.kind.__name__, (Counted, self.kind), {"__module__": self.kind.__module__})
        with torch.device("meta" if self.device == "meta" else "cpu"):
            return counted(config).to(self.dtype).eval().requires_grad_(False)  # type: ignore[no-any-return]

    def sample(self) -> Sample | None:
        if self.inputs is None:
            return None
        ids = torch.randint(0, 1000, self.inputs)
        return lora_fx.call(input_ids=ids, attention_mask=torch.ones_like(ids))


@dataclass(slots=True)
class Runs:
    whole: int = 0
    shown: int = 0


RUNS = Runs()
"""Since it was last set to none.  Not of a class: a model whose classes change is looked at again."""


class Counted(nn.Module):
    """Mixin that counts the runs of a model and of its twins."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = super().forward(*args, **kwargs)  # a run that the model refuses does not count
        if any(isinstance(mode, ThinLinears) for mode in function_modes()):
            RUNS.shown += 1
        else:
            RUNS.whole += 1
        return result


QWEN = Qwen2Config(
    hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
LARGE = LlamaConfig(
    hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
    intermediate_size=53248, vocab_size=128256,
)  # fmt: skip
CASES = (
    Case("BERT-base, float32", BertModel, BertConfig(), (4, 128)),
    Case("Qwen2 0.5B, bfloat16", Qwen2ForCausalLM, QWEN, (2, 128), torch.bfloat16),
    Case("Qwen2 0.5B, bfloat16", Qwen2ForCausalLM, QWEN, None, torch.bfloat16),
    Case("Llama 405B, meta device", LlamaForCausalLM, LARGE, None, torch.bfloat16, "meta"),
)


def seconds(work: Callable[[], T]) -> tuple[float, T]:
    """Return the processor time of all threads that the work takes, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def warm_up(case: Case, sample: Sample | None) -> None:
    """Adapt a small model of the class, and forget its graphs."""
    lora_fx.apply(case.model(small=True), r=8, target="all-linear", example_inputs=sample)
    KNOWN.clear()
    LOOKS.clear()


def counted(where: Any, name: str) -> list[None]:
    """Return a list that grows with every call of a function, from now on."""
    calls: list[None] = []
    function = getattr(where, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    setattr(where, name, counting)
    return calls


def calls_of(work: Callable[[], object]) -> int:
    """Return how many functions written in Python the work calls, in all of its threads."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


class Flops(TorchDispatchMode):
    """Adds up the FLOPs of products, attention and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.sum += formula(*args, **(kwargs or {}), out_val=result) if formula is not None else 0
        return result


@contextlib.contextmanager
def flops() -> Iterator[Flops]:
    """Give the sum of what runs of models and of blocks compute; around these there is no mode that could be seen."""
    counting = Flops()
    places = ((study, "weight_uses"), (survey, "_run"), (survey, "_sends_gradients"), (checking, "in_clean_thread"))
    before = [(where, name, getattr(where, name)) for where, name in places]

    inside = threading.local()

    def counted_in(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if hasattr(inside, "already"):
                return function(*args)
            inside.already = True
            try:
                with counting:
                    return function(*args)
            finally:
                del inside.already

        return run

    for where, name, function in before:
        threads = name == "in_clean_thread"
        seen = (lambda work: IN_CLEAN_THREAD(counted_in(work))) if threads else counted_in(function)
        setattr(where, name, seen)
    try:
        yield counting
    finally:
        for where, name, function in before:
            setattr(where, name, function)


IN_CLEAN_THREAD = checking.in_clean_thread


def tries(case: Case, sample: Sample | None) -> Iterator[tuple[str, functools.partial[nn.Module]]]:
    """Yield what adapts the first model of a class, the next one, whose weights are others, and that one again."""
    warm_up(case, sample)
    settings: dict[str, Any] = {"r": 8, "target": "all-linear", "example_inputs": sample}
    yield "first", functools.partial(lora_fx.apply, case.model(), **settings)
    model = case.model()
    yield "next", functools.partial(lora_fx.apply, model, **settings)
    yield "again", functools.partial(lora_fx.apply, model, **settings)


def compared(case: Case) -> Iterator[tuple[str, ...]]:
    """Yield a line for each of the tries."""
    sample = case.sample()
    computed = [over_forward(case, adapt) for _, adapt in tries(case, sample)]
    captures, proofs = counted(learning, "capture"), counted(Replay, "difference")
    for (which, adapt), ratio in zip(tries(case, sample), computed, strict=True):
        RUNS.whole = RUNS.shown = 0
        captures.clear()
        proofs.clear()
        calls = calls_of(adapt)
        numbers = (len(captures), len(proofs), RUNS.whole, RUNS.shown)
        yield (case.name, named(case), which, *map(str, numbers), f"{calls / 1000:.0f}", f"{ratio:.2f}")


def over_forward(case: Case, adapt: functools.partial[nn.Module]) -> float:
    """Return the FLOPs of what adapts a model over those of a forward of its inputs."""
    model = adapt.args[0]
    sample = samples_for(model, case.sample()).items[0]
    with flops() as computed:
        adapt()
    with Flops() as one, torch.no_grad():
        model(*sample.args, **sample.kwargs)
    return computed.sum / one.sum


def named(case: Case) -> str:
    return "x".join(map(str, case.inputs)) if case.inputs else "none"


def measured(case: Case) -> Iterator[str]:
    """Yield the cells of one line."""
    sample = case.sample()
    warm_up(case, sample)
    model = case.model()
    forward = 0.0
    if sample is not None:
        with torch.no_grad():
            forward = min(seconds(lambda: model(*sample.args, **sample.kwargs))[0] for _ in range(3))
    RUNS.whole = RUNS.shown = 0
    plan_time, plan = seconds(lambda: lora_fx.plan(model, r=8, target="all-linear", example_inputs=sample))
    apply_time, _ = seconds(lambda: lora_fx.apply(model, plan))
    whole, shown = RUNS.whole, RUNS.shown
    modules, _ = seconds(lambda: lora_fx.apply(model, r=8, target="all-linear", backend="modules"))
    peer, _ = seconds(lambda: get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")))
    yield case.name
    yield named(case)
    yield f"{forward:.2f} s" if forward else ""
    yield f"{plan_time:.2f} s"
    yield f"{apply_time:.2f} s"
    yield f"{(plan_time + apply_time) / forward:.1f}" if forward else ""
    yield f"{modules:.2f} s"
    yield f"{peer:.2f} s"
    yield str(whole)
    yield str(shown)


def line(number: int) -> tuple[str, ...]:
    torch.set_num_threads(1)
    return tuple(measured(CASES[number]))


def lines(number: int) -> list[tuple[str, ...]]:
    torch.set_num_threads(1)
    return list(compared(CASES[number]))


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    asked.add_argument("--next", action="store_true", help="count what is done for the first model and for the next")
    options = asked.parse_args(words)
    table = [NEXT if options.next else HEAD]
    for number in options.cases:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            table += pool.apply(lines, (number,)) if options.next else [pool.apply(line, (number,))]
        print(*table[-1], sep="  ", file=sys.stderr, flush=True)
    told(options.write, "wait-next" if options.next else "wait", table)


if __name__ == "__main__":
    main()
