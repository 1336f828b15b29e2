"""One small model for every kind of site, and what each must equal: the same model with W + scaling · B A in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import lora_fx
from lora_fx.models.samples import Sample

RANK, ALPHA = 2, 3.0
SCALING = ALPHA / RANK
Inputs = Callable[[], tuple[Any, ...] | dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """A model with adapted weights, and how to call it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Inputs
    weights: Mapping[str, str]
    """Name of each adapted parameter, and its layout: `out_in`, `in_out`, `bank out_in` or `bank in_out`."""
    raw: bool = False
    """Whether a run has to show the sites."""
    linear: bool = False
    """Whether the output is linear in ΔW."""
    drops: bool = True
    """Whether dropout can act: there is a product with the weight itself."""
    quick: bool = True
    """Whether its graphs are captured in every run of the tests, not only in the slow one."""
    fused: bool = False
    """Whether torch runs a part of it that is not adapted as one kernel, which rounds otherwise than its layers."""
    double: bool = True
    """Whether torch's kernels for it know float64."""

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the base model, in eval mode; always the same values."""
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def sample(self, dtype: torch.dtype = torch.float32) -> Sample:
        torch.manual_seed(1)
        given = self.inputs()
        args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
        return lora_fx.call(
            *(_cast(argument, dtype) for argument in args), **{k: _cast(v, dtype) for k, v in kwargs.items()}
        )

    def rules(self, dropout: float = 0.0, **more: Any) -> dict[str, Any]:
        names = sorted(name.removesuffix(".weight") for name in self.weights)
        lora = {"r": RANK, "alpha": ALPHA, "dropout": dropout}
        return {"version": 1, "rules": [{"match": {"name": names}, "lora": lora, **more}]}

    def adapted(self, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
        return lora_fx.apply(self.build(dtype), self.rules(dropout), self.sample(dtype), backend=backend)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(argument, dtype) for argument in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def run(model: nn.Module, sample: Sample, training: bool = False, grad: bool = False, seed: int = 7) -> Tensor:
    """Return all that the model gives back, as one flat tensor.

    A frozen base would run torch's fused encoder layer even with gradients on, which rounds otherwise than the layers
    that an adapted model then needs.
    """
    model.train(training)
    torch.manual_seed(seed)
    torch.backends.mha.set_fastpath_enabled(not grad)
    try:
        with torch.set_grad_enabled(grad):
            return flat(model(*sample.args, **sample.kwargs))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def flat(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result.flatten()
    if isinstance(result, dict):
        result = list(result.values())
    return torch.cat([flat(part) for part in result if part is not None])


def randomise_(tuned: nn.Module, scale: float = 0.4) -> None:
    """Give all factors random values, the same for the same names."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, factor in sorted(factors(tuned).items()):
            factor.copy_(scale * torch.randn(factor.shape, generator=generator, dtype=torch.float64))


def factors(tuned: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in tuned.named_parameters() if ".lora_" in f".{name}".replace("_lora.", ".")
    }


def factors_of(tuned: nn.Module, weight: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A and B of a weight, found by their documented keys."""
    owner, _, name = weight.rpartition(".")
    parameters = dict(tuned.named_parameters())
    beside = f"{owner}." if owner else ""
    beside_it = {key for key in parameters if key.startswith(f"{beside}{name}_lora.")}
    stem = f"{beside}{name}_lora." if beside_it else beside
    return parameters[f"{stem}lora_A.default.weight"], parameters[f"{stem}lora_B.default.weight"]


def dense_delta(A: Tensor, B: Tensor, layout: str, stored: Iterable[int], scaling: float = SCALING) -> Tensor:
    """Return scaling · B A in the shape of the stored weight.

    A is [r, in], [r, in, kernel…] or, of a bank, [bank, r, in]; B [out, r], [out, r, 1…] or [bank, out, r].
    """
    delta = B @ A if layout.startswith("bank") else B.flatten(1) @ A.flatten(1)
    delta = delta.transpose(-1, -2) if layout.endswith("in_out") else delta
    return scaling * delta.reshape(tuple(stored))


def dense_weights(kind: Kind, tuned: nn.Module) -> dict[str, Tensor]:
    """Return W + scaling · B A for every adapted weight, with a graph back to A and B."""
    plain = {name: p.detach() for name, p in kind.build().to(_dtype(tuned)).named_parameters(remove_duplicate=False)}
    weights = {}
    for name, layout in kind.weights.items():
        A, B = factors_of(tuned, name)
        wide = torch.promote_types(A.dtype, plain[name].dtype)
        weights[name] = plain[name].to(wide) + dense_delta(A.to(wide), B.to(wide), layout, plain[name].shape)
    return weights


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if "lora_" not in name)


def reference(kind: Kind, tuned: nn.Module, sample: Sample, training: bool = False, seed: int = 7) -> Tensor:
    """Return what the plain model computes with the dense weights, with a graph back to A and B."""
    weights = dense_weights(kind, tuned)
    dtype = next(iter(weights.values())).dtype
    model = kind.build(dtype).requires_grad_(False).train(training)
    args, kwargs = _cast(sample.args, dtype), {k: _cast(v, dtype) for k, v in sample.kwargs.items()}
    torch.manual_seed(seed)
    return flat(functional_call(model, weights, args, kwargs, tie_weights=False))


def relative(result: Tensor, expected: Tensor) -> float:
    """Return the greatest difference, in units of the greatest value expected."""
    difference = (result.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max().clamp_min(1e-30))


def same_values(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same keys with the same bits."""
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


BACKENDS = ("auto", "modules")


def crossed(kinds: Iterable[Kind], backends: Iterable[str] = BACKENDS) -> list[Any]:
    """Return (kind, backend) for every pair, as parameters of a test."""
    return [
        pytest.param(kind, backend, id=f"{kind.name}-{backend}",
                     marks=[pytest.mark.slow] if backend == "auto" and not kind.quick else [])
        for kind in kinds
        for backend in backends
    ]  # fmt: skip


def assert_starts_as_its_base(kind: Kind, tuned: nn.Module, dtype: torch.dtype, read: bool = False) -> None:
    """Assert it bit by bit but for fused kernels; where the weights are read, as torch computes with their gradients."""
    base, sample = kind.build(dtype).requires_grad_(False), kind.sample(dtype)
    for training in (False, True):
        for grad in (False, True):
            for name in kind.weights if read else ():
                base.get_parameter(name).requires_grad_(grad)
            result, expected = run(tuned, sample, training, grad), run(base, sample, training, grad)
            if kind.fused and grad and not training:
                assert relative(result, expected) <= (2**-7 if dtype == torch.bfloat16 else 1e-6)
            else:
                assert torch.equal(result, expected), (training, grad)


def gradients(result: Tensor, tuned: nn.Module) -> list[Tensor]:
    """Return those of the factors, for a loss in which each element of the result has a weight of its own."""
    number = torch.arange(result.numel(), dtype=result.dtype)
    loss = (result * (number.cos() + (7 * number).sin())).sum()
    return list(torch.autograd.grad(loss, list(factors(tuned).values())))


def result_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a model makes of x, and the gradient that reaches x."""
    x = x.clone().requires_grad_()
    result = model(x)
    result.square().mean().backward()
    assert x.grad is not None
    return result.detach(), x.grad
