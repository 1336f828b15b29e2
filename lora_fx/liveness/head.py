"""Where logits come from: a frozen linear, with its adapter or without, applied to the rows that are asked for."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import RefusedError
from lora_fx.liveness.rows import LazyRows, take, whole
from lora_fx.liveness.sources import RowSource, leaves_of
from lora_fx.models.torch_internals import any_autocast_enabled


class HeadSource(RowSource):
    """`function(x, *parameters)`, row by row of x."""

    def __init__(
        self,
        x: Tensor,
        function: Callable[..., Tensor],
        parameters: Sequence[Tensor],
        features: int,
        dtype: torch.dtype,
        frozen: Sequence[Tensor] = (),
    ) -> None:
        """Note what is to be computed, with the parameters as they are now.

        Args:
            x: [*rows, in]; lazy or not.
            function: differentiable, of x and parameters; each row of its result depends on the same row of x alone.
            parameters: that may require a gradient, and that an optimiser may change in place: copies are kept.
            features: of the result.
            dtype: of the result.
            frozen: what else the function reads; refused once it has been written to.
        """
        self.x, self.function, self.parameters = x, function, tuple(parameters)
        self.shape, self.dtype, self.device = torch.Size((*x.shape[:-1], features)), dtype, x.device
        self.inputs = (*leaves_of(x), *self.parameters)
        self._copies = tuple(t.detach().clone() if t.is_leaf else t.detach() for t in self.parameters)
        self._frozen = tuple(frozen)
        self._versions = tuple(map(version_of, (*self.inputs, *self._frozen)))

    def take(self, rows: Tensor) -> Tensor:
        return self._computed(lambda: take(self.x, rows))

    def whole(self) -> Tensor:
        return self._computed(lambda: whole(self.x) if type(self.x) is LazyRows else self.x)

    def unreachable(self) -> Tensor | None:
        return self.x.lazy_value.source.unreachable() if type(self.x) is LazyRows else None

    def input_rows(self, rows: Tensor | None) -> Tensor:
        """Return rows of x, [len(rows), in], differentiable; None: all."""
        self._check_input()
        return take(self.x, rows)

    def _computed(self, input: Callable[[], Tensor]) -> Tensor:
        self._check_input()
        with without_autocast(self.device):
            x = input()
            if not self.is_outdated:
                return self.function(x, *self.parameters)
            with torch.no_grad():
                value = self.function(x, *self._copies)
            late: Tensor = _Late.apply(value, *self.inputs)  # type: ignore[no-untyped-call]
            return late

    @property
    def is_outdated(self) -> bool:
        """Whether a parameter has been changed since the forward: also by one that does not count what it writes.

        As fused optimisers do, and those that write to `parameter.data`.
        """
        start, end = len(self.inputs) - len(self.parameters), len(self.inputs)
        if self._versions[start:end] != tuple(map(version_of, self.parameters)):
            return True
        return any(t.is_leaf and not same_bits(t, copy) for t, copy in zip(self.parameters, self._copies, strict=True))

    def _check_input(self) -> None:
        number = len(self.inputs) - len(self.parameters)
        if self._versions[:number] != tuple(map(version_of, self.inputs[:number])):
            raise RefusedError(
                "logits are asked for after the hidden states that they are made of were written to",
                advice='ask before, or apply without "loss" and "liveness" in `optimise`',
            )
        if self._versions[len(self.inputs) :] != tuple(map(version_of, self._frozen)):
            raise RefusedError(
                "logits are asked for after the weight of the head that makes them was written to",
                advice='ask before, or apply without "loss" and "liveness" in `optimise`',
            )


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been written to, as far as torch counts."""
    return 0 if tensor.is_inference() else tensor._version


def same_bits(tensor: Tensor, copy: Tensor) -> bool:
    """Whether a tensor is its copy still, NaN included."""
    if tensor.dtype != copy.dtype or tensor.device != copy.device or tensor.shape != copy.shape:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[copy.element_size()]
    return torch.equal(tensor.detach().view(bits), copy.view(bits))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtypes that they are given."""
    return torch.autocast(device.type, enabled=False) if any_autocast_enabled() else contextlib.nullcontext()


class _Late(torch.autograd.Function):
    """Logits as they were before an optimiser's step; they have no gradient any more."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *inputs: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RefusedError(
            "a gradient is asked for through logits that were first read after the adapter of the head had changed",
            advice='read them before the step, or apply without "loss" and "liveness" in `optimise`',
        )
