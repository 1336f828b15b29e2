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
from lora_fx.regions.install import regions
from lora_fx.tensors import dotted
from tests.zoo import randomise_

SHAPES = ((3, 15), (1, 7), (4, 12), (2, 1))
MODES = ((False, False), (True, True), (False, True))
"""(training, grad mode)."""
RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2}}]}
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
    wrong: list[str] = field(default_factory=list)


def examine(model: nn.Module, inputs: Inputs, tensors: Tensors, dtype: torch.dtype = torch.float32) -> Findings:
    """Adapt the model for one sample and compare it, at other sizes, with its base and with module replacement."""
    model = model.to(dtype).requires_grad_(False)
    inputs = _in(inputs, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args, kwargs = inputs(2, 10)
        tuned = lora_fx.apply(model, RULES, lora_fx.call(*args, **kwargs))
        found = _new_findings(model, tuned)
        for call in _calls(model, inputs):
            _beside_base(found, call, tuned, model, tensors)
        modules = lora_fx.apply(model, RULES, lora_fx.call(*args, **kwargs), backend="modules")
        randomise_(tuned)
        modules.load_state_dict(tuned.state_dict())
        for call in _calls(model, inputs):
            _beside_modules(found, call, tuned, modules, tensors)
    return found


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


def _calls(model: nn.Module, inputs: Inputs) -> Iterator[Call]:
    """Yield the calls that the base accepts."""
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
    yield from accepted


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
    adapted = {site.path for site in lora_fx.inspect(tuned).sites}
    return Findings(linears, blocks, adapted, set(blocks))


def _in_block(model: nn.Module, path: str) -> bool:
    """Whether the linear lies inside an element of a ModuleList or Sequential."""
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1)]
    return any(isinstance(owner, (nn.ModuleList, nn.Sequential)) for owner in owners)


def _beside_base(found: Findings, call: Call, tuned: nn.Module, base: nn.Module, tensors: Tensors) -> None:
    expected = tensors(call.of(base))
    before = _counts(tuned)
    result = tensors(call.of(tuned))
    found.in_graphs &= _answered(tuned, before)
    fused = call.grad and not call.training and any(isinstance(m, nn.TransformerEncoderLayer) for m in base.modules())
    for index, (one, other) in enumerate(zip(result, expected, strict=True)):
        rounding = 1e-5 if one.dtype == torch.float32 else 0.05
        same = torch.allclose(one, other, atol=rounding) if fused else torch.equal(_numbers(one), _numbers(other))
        if not same:  # a frozen base is fused by torch there, an adapted model cannot be: it needs gradients
            found.wrong.append(f"{call.name}: output {index} beside the base, off by {(one - other).abs().max():.2g}")


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().nan_to_num(nan=12345.0)


def _counts(tuned: nn.Module) -> dict[str, tuple[int, int]]:
    return {path: (region.hits, sum(region.misses.values())) for path, _, region in regions(tuned)}


def _answered(tuned: nn.Module, before: dict[str, tuple[int, int]]) -> set[str]:
    """Return the linears of the regions that were hit since, and not missed."""
    found: set[str] = set()
    for path, _, region in regions(tuned):
        hits, misses = before[path]
        if region.hits > hits and sum(region.misses.values()) == misses:
            inside = [program.computes for program in region.kind.programs if not program.static]
            found |= {dotted(path, each) for each in frozenset.intersection(*inside)} if inside else set()
    return found


def _beside_modules(found: Findings, call: Call, tuned: nn.Module, modules: nn.Module, tensors: Tensors) -> None:
    gradients = []
    results = []
    for model in (tuned, modules):
        model.zero_grad()
        outputs = tensors(call.of(model))
        if call.grad and any(each.requires_grad for each in outputs):
            sum(each.nan_to_num().float().square().mean() for each in outputs if each.requires_grad).backward()
        results.append(outputs)
        gradients.append([p.grad for p in lora_fx.parameters(model)])
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        if _far(one, other):
            found.wrong.append(f"{call.name}: output {index} beside modules")
    for index, (one, other) in enumerate(zip(*gradients, strict=True)):
        if (one is None) != (other is None) or (one is not None and _far(one, other)):
            found.wrong.append(f"{call.name}: gradient {index} beside modules")


def _far(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than rounding, relative to the largest value."""
    tolerance = 1e-5 if one.dtype == torch.float32 else 0.05
    a, b = _numbers(one).double(), _numbers(other).double()
    return a.shape != b.shape or bool((a - b).abs().max() > tolerance * max(1e-3, b.abs().max().item()))
