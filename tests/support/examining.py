"""Examine one adapted architecture: which linears ran in a graph at sizes not seen before, and what came out wrong."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.models.tensors import dotted
from lora_fx.regions.install import regions
from tests.support.zoo import randomise_

SHAPES = ((3, 15), (1, 7), (4, 12), (2, 1))
MODES = ((False, False), (True, True), (False, True))
"""(training, grad mode)."""
RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2}}]}
EVERY_KIND = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
Inputs = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]
Tensors = Callable[[Any], list[Tensor]]


@dataclass
class Findings:
    """What the examination of one architecture found."""

    linears: set[str]
    in_blocks: set[str]
    adapted: set[str]
    in_graphs: set[str]
    """Linears of blocks whose every call so far was answered by a graph at once."""
    weights: set[str]
    """Names of the adapted weights."""
    graph_sites: int
    """Number of adapted sites that the plan puts in graphs."""
    wrong: list[str] = field(default_factory=list)


def examine(
    model: nn.Module,
    inputs: Inputs,
    tensors: Tensors,
    dtype: torch.dtype = torch.float32,
    rules: dict[str, Any] = RULES,
) -> Findings:
    """Adapt the model for one sample and compare it at other sizes.

    With B = 0 it is compared with its base, with random values with module replacement, with what it is merged into,
    and what is left after `remove` with the base again.
    """
    model = model.to(dtype).requires_grad_(False)
    inputs = _in(inputs, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = inputs(2, 10)
        tuned = lora_fx.apply(model, rules, lora_fx.call(*args, **kwargs))
        findings, calls = _new_findings(model, tuned), _calls(model, inputs)
        for call in calls:
            _beside_base(findings, call, tuned, model, tensors)
        modules = lora_fx.apply(model, rules, lora_fx.call(*args, **kwargs), backend="modules")
        randomise_(tuned)
        modules.load_state_dict(tuned.state_dict())
        for call in calls:
            _beside_modules(findings, call, tuned, modules, tensors)
        merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
        for call in calls:
            _beside_merged(findings, call, tuned, merged, tensors)
            _beside_removed(findings, call, model, removed, tensors)
    return findings


@dataclass(frozen=True)
class Call:
    """One call in one mode."""

    name: str
    training: bool
    grad: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def of(self, model: nn.Module) -> Any:
        model.train(self.training)
        torch.manual_seed(3)
        with torch.set_grad_enabled(self.grad):
            return model(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))


def _calls(model: nn.Module, inputs: Inputs) -> list[Call]:
    """Return the calls that the base accepts."""
    trial = copy.deepcopy(model)  # a call may change running statistics
    accepted: list[Call] = []
    for batch, length in SHAPES:
        args, kwargs = inputs(batch, length)
        without = {key: value for key, value in kwargs.items() if "mask" not in key}
        for masks, given in (("", kwargs), (" without masks", without)):
            if given is kwargs or len(given) < len(kwargs):
                for training, grad in MODES:
                    name = f"({batch}, {length}){masks}{' train' * training}{' grad' * grad}"
                    call = Call(name, training, grad, args, given)
                    with contextlib.suppress(Exception):
                        call.of(trial)
                        accepted.append(call)
    return accepted


def _in(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    def cast(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = inputs(batch, length)

        def one(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        return tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}

    return cast


def _new_findings(model: nn.Module, tuned: nn.Module) -> Findings:
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = {path for path in linears if _in_block(model, path)}
    sites = lora_fx.inspect(tuned).sites
    weights = {dotted(path, "weight" if adapter.spec.path_is_owner else "") for path, adapter in all_attached(tuned)}
    graphs = sum(site.backend == "graph" for site in sites)
    return Findings(linears, blocks, {site.path for site in sites}, set(blocks), weights, graphs)


def _in_block(model: nn.Module, path: str) -> bool:
    """Whether the linear lies inside an element of a ModuleList or Sequential."""
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1)]
    return any(isinstance(owner, (nn.ModuleList, nn.Sequential)) for owner in owners)


def _beside_base(findings: Findings, call: Call, tuned: nn.Module, base: nn.Module, tensors: Tensors) -> None:
    expected = tensors(call.of(base))
    before = _counts(tuned)
    result = tensors(call.of(tuned))
    findings.in_graphs &= _answered(tuned, before)
    if call.grad and not all(map(_same, result, expected)):
        with _wanting_gradients(base, findings.weights):
            expected = tensors(call.of(base))
    fused = call.grad and not call.training and any(isinstance(m, nn.TransformerEncoderLayer) for m in base.modules())
    for index, (one, other) in enumerate(zip(result, expected, strict=True)):
        rounding = 1e-5 if one.dtype == torch.float32 else 0.05
        if not (_same(one, other) or (fused and torch.allclose(one, other, atol=rounding))):
            findings.wrong.append(
                f"{call.name}: output {index} beside the base, off by {(one - other).abs().max():.2g}"
            )


@contextlib.contextmanager
def _wanting_gradients(base: nn.Module, weights: set[str]) -> Iterator[None]:
    """Let the weights that are adapted need gradients in the base too.

    torch picks kernels by that: another for attention whose mask needs some, as T5's position bias then does.
    """
    parameters = [base.get_parameter(name) for name in weights]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(_numbers(one), _numbers(other))


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().nan_to_num(nan=12345.0)


def _counts(tuned: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: (region.hits, sum(region.misses.values())) for path, _, region in regions(tuned)}


def _answered(tuned: nn.Module, before: dict[str, tuple[int, int]]) -> set[str]:
    """Return the linears of the regions that were hit since, and not missed."""
    answered: set[str] = set()
    for path, _, region in regions(tuned):
        hits, misses = before[path]
        if region.hits > hits and sum(region.misses.values()) == misses:
            inside = [program.computes for program in region.block.programs if not program.static]
            answered |= {dotted(path, inner) for inner in frozenset.intersection(*inside)} if inside else set()
    return answered


def _beside_modules(findings: Findings, call: Call, tuned: nn.Module, modules: nn.Module, tensors: Tensors) -> None:
    gradients = []
    results = []
    for model in (tuned, modules):
        model.zero_grad()
        outputs = tensors(call.of(model))
        if call.grad and any(tensor.requires_grad for tensor in outputs):
            # every second number: the mean square of all that a norm returns is constant, its gradient mere rounding
            halves = [tensor.nan_to_num().float().flatten()[::2] for tensor in outputs if tensor.requires_grad]
            sum(tensor.square().mean() for tensor in halves).backward()
        results.append(outputs)
        gradients.append([p.grad for p in lora_fx.parameters(model)])
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        if _far(one, other):
            findings.wrong.append(f"{call.name}: output {index} beside modules")
    # optimised graphs sum gradients in another order, and a half-precision base rounds each sum
    tolerance = 0.1 if any(parameter.dtype != torch.float32 for parameter in modules.parameters()) else 1e-4
    # those that are zero but for rounding (of q and k at a single position) count by the largest
    least = 0.1 * max((gradient.norm().item() for gradient in gradients[1] if gradient is not None), default=0.0)
    for index, (one, other) in enumerate(zip(*gradients, strict=True)):
        if (one is None) != (other is None) or (one is not None and _apart(one, other, tolerance, least)):
            findings.wrong.append(f"{call.name}: gradient {index} beside modules")


def _beside_merged(findings: Findings, call: Call, tuned: nn.Module, merged: nn.Module, tensors: Tensors) -> None:
    """Half precision rounds every merged weight once more, and a row may be routed to another expert by that.

    Single values may then be far off, all together are not.
    """
    half = any(parameter.dtype != torch.float32 for parameter in merged.parameters())
    for index, (one, other) in enumerate(zip(tensors(call.of(tuned)), tensors(call.of(merged)), strict=True)):
        a, b = _numbers(one).double(), _numbers(other).double()
        if _far(one, other, 1e-4) and not (half and (a - b).norm() <= 0.2 * b.norm()):
            findings.wrong.append(f"{call.name}: output {index} beside the merged model")


def _beside_removed(findings: Findings, call: Call, base: nn.Module, removed: nn.Module, tensors: Tensors) -> None:
    for index, (one, other) in enumerate(zip(tensors(call.of(removed)), tensors(call.of(base)), strict=True)):
        if not _same(one, other):
            findings.wrong.append(f"{call.name}: output {index} after remove")


def _apart(one: Tensor, other: Tensor, tolerance: float, least: float) -> bool:
    """Whether two gradients differ by more than rounding, all values together, relative to `least` or what is more."""
    a, b = _numbers(one).double(), _numbers(other).double()
    return a.shape != b.shape or bool((a - b).norm() > tolerance * max(1e-3, least, b.norm().item()))


def _far(one: Tensor, other: Tensor, tolerance: float = 0.0) -> bool:
    """Whether two tensors differ by more than rounding, relative to the largest value."""
    tolerance = tolerance or (1e-5 if one.dtype == torch.float32 else 0.05)
    a, b = _numbers(one).double(), _numbers(other).double()
    return a.shape != b.shape or bool((a - b).abs().max() > tolerance * max(1e-3, b.abs().max().item()))
