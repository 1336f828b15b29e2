"""What a model's step costs once rows that nobody reads are left out, and why it costs what it did where none are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.bench.counters import flops
from lora_fx.regions.install import regions

BATCH, LENGTH = 4, 12
REAL = (12, 9, 6, 4)
"""How many tokens of each sequence are none of padding, where a model takes a mask."""
_STEPS = 3
"""As many as it takes to prove code, and to give up what is asked for as a whole."""


@dataclass(frozen=True)
class Gain:
    """FLOPs of a step with "liveness" and "loss", over those without; what was left out, and why no more was."""

    ratio: float
    padding: bool
    labels: bool
    head: bool
    reasons: tuple[str, ...]

    @property
    def is_one(self) -> bool:
        """Whether liveness alone, padding or labels, makes the step cheaper."""
        return self.ratio < 0.99 and (self.padding or self.labels)


def gain_of(
    model: nn.Module, make_inputs: Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]], main: Any
) -> Gain:
    """Return what a model gains, on sentences of several lengths of which three tokens in ten are labelled.

    Args:
        model: without dropout.
        make_inputs: gives (args, kwargs) of a batch and a length.
        main: gives the floating-point tensors of what the model returns, the first of which meets the loss.
    """
    args, kwargs = make_inputs(BATCH, LENGTH)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape == (BATCH, LENGTH):
        kwargs["attention_mask"] = (torch.arange(LENGTH) < torch.tensor(REAL).unsqueeze(1)).to(mask)
    spent, tuned = [], model
    for names in (["stack", "recompute"], ["stack", "recompute", "liveness", "loss"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sample = lora_fx.call(*args, **kwargs)
            tuned = lora_fx.apply(model, r=2, target="all-linear", example_inputs=sample, optimise=names).train()
            for _ in range(_STEPS):
                _step(tuned, args, kwargs, main)
            spent.append(flops(lambda tuned=tuned: _step(tuned, args, kwargs, main)))
    report = lora_fx.inspect(tuned)
    found = [region for _, _, region in regions(tuned)]
    reasons = [why for region in report.regions for why in (*region.given_up, *region.failures)]
    reasons += [f"loss: {late.refused}" for late in report.late if late.refused]
    return Gain(
        spent[1] / spent[0],
        any(region.tally.packed > _STEPS and not region.tally.stopped for region in found),
        any(region.deferring.tally.packed > _STEPS and not region.deferring.tally.stopped for region in found),
        any(late.calls for late in report.late),
        tuple(dict.fromkeys(reasons)),
    )


def _step(tuned: nn.Module, args: Any, kwargs: Any, main: Any) -> None:
    outputs = tuned(*args, **kwargs)
    with contextlib.suppress(AttributeError):
        outputs = outputs.logits
    first = outputs if isinstance(outputs, Tensor) else main(outputs)[0]
    _loss(first, kwargs.get("attention_mask")).backward()


def _loss(result: Tensor, mask: Tensor | None) -> Tensor:
    if result.dim() == 2:
        return F.cross_entropy(result, torch.arange(len(result)) % result.shape[1])
    if result.dim() != 3:
        return result.square().mean()
    numbers = torch.arange(result.shape[0] * result.shape[1])
    labelled = numbers * 7 % 10 < 3
    if mask is not None and mask.shape == result.shape[:2]:
        labelled &= mask.flatten().bool()
    return F.cross_entropy(result.flatten(0, 1), torch.where(labelled, numbers % result.shape[2], -100))
