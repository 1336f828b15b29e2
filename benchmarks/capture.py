"""What capturing and guarding cost: `python benchmarks/capture.py` prints it; times are of this machine.

Seconds of `apply` for 2 and for 32 layers of one shape, microseconds of a guard, and the time of a block's graph over
that of the module backend (d = 768, 512 tokens), paired and interleaved, beside the module backend over itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import lora_fx
from lora_fx.models.samples import Sample
from lora_fx.regions.install import regions

RULES = {"version": 1, "rules": [{"match": {"name": "**.{q,v}_proj"}, "lora": {"r": 8}}]}
PAIRS = 40


def llama(layers: int, width: int) -> nn.Module:
    """Return a Llama-type decoder with random weights."""
    torch.manual_seed(0)
    heads = max(4, width // 64)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=100, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config).eval()


def inputs(length: int) -> Sample:
    return lora_fx.call(torch.randint(0, 100, (1, length)), use_cache=False)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def capture_times() -> None:
    lora_fx.apply(llama(2, 32), RULES, inputs(10))  # imports and first uses are not the capture's
    few, many = (seconds(lambda n=n: lora_fx.apply(llama(n, 32), RULES, inputs(10))) for n in (2, 32))
    print(f"apply, 2 layers: {few:.2f} s; 32 layers: {many:.2f} s ({many / few:.2f} times)")


def guard_time() -> None:
    tuned = lora_fx.apply(llama(2, 32), RULES, inputs(10))
    calls: list[tuple[nn.Module, tuple[object, ...], dict[str, object]]] = []
    path, block, region = next(region for region in regions(tuned) if region[2].block.programs)
    hook = block.register_forward_pre_hook(lambda m, a, k: calls.append((m, a, k)), with_kwargs=True)
    with torch.no_grad():
        sample = inputs(10)
        tuned(*sample.args, **sample.kwargs)
    hook.remove()
    module, args, kwargs = calls[0]
    number = 2000
    spent = seconds(lambda: [region.find(module, args, kwargs) for _ in range(number)])
    print(f"guard of {path}: {spent / number * 1e6:.1f} microseconds a call")


def graph_over_modules() -> None:
    sample = inputs(512)
    base = llama(1, 768)
    graph = lora_fx.apply(base, RULES, sample)
    modules = lora_fx.apply(base, RULES, backend="modules")

    def run(model: nn.Module) -> float:
        with torch.no_grad():
            return seconds(lambda: model(*sample.args, **sample.kwargs))

    for model in (graph, modules):
        run(model)
    ratios, control = [], []
    for _ in range(PAIRS):
        a, b, c = run(graph), run(modules), run(modules)
        ratios.append(a / b)
        control.append(c / b)
    print(
        f"graph over modules, d = 768, 512 tokens: {statistics.median(ratios):.3f} (modules over themselves: "
        f"{statistics.median(control):.3f}; {PAIRS} pairs, medians)"
    )


def main() -> None:
    torch.set_num_threads(1)
    capture_times()
    guard_time()
    graph_over_modules()


if __name__ == "__main__":
    main()
