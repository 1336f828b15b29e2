"""Run a program on the call that the forward has just answered, and compare the two bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.guards import Match
from lora_fx.capture.objects import copied, is_plain_object, objects_differ, tensors_in
from lora_fx.capture.recording import Records
from lora_fx.capture.surroundings import RandomState, in_clean_thread, surroundings_of
from lora_fx.capture.torch_internals import pytree
from lora_fx.regions.program import Program


class Replay:
    """A call kept so that it can be made again: copies of its arguments, the buffers and the random state before it."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.args, self.kwargs = copied((args, kwargs), _copy)
        self._given = (args, kwargs)
        devices = {tensor.device for tensor in (*tensors_in((args, kwargs)), *module.parameters())}
        self.surroundings = surroundings_of(devices)
        self.random = RandomState(self.surroundings.devices)
        self.buffers = _buffers(module)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a fresh copy of the arguments: a forward may write to them."""
        fresh: tuple[tuple[Any, ...], dict[str, Any]] = copied((self.args, self.kwargs), _copy)
        return fresh

    def difference(self, program: Program, match: Match, answer: Any) -> str | None:
        """Return how the program's result differs from `answer`, which the forward gave; None if not at all.

        Buffers and random state are left as the forward left them.
        """
        arguments = self.arguments()
        inputs = match(self.module, *arguments)
        if isinstance(inputs, int):
            return f"its own guard refuses it: {program.guard.reasons[inputs]}"
        after, buffers_after = RandomState(self.surroundings.devices), _buffers(self.module)
        self.random.restore()
        _restore(self.module, self.buffers)
        try:
            result = in_clean_thread(lambda: self._run(lambda: program.function(self.module, *inputs)))
            if RandomState(self.surroundings.devices) != after:
                return "it draws other random numbers"
            return difference(result, answer) or self._left_behind_differs(arguments, buffers_after)
        except Exception as error:
            return f"it fails: {type(error).__name__}: {str(error)[:200]}"
        finally:
            after.restore()
            _restore(self.module, buffers_after)

    def _left_behind_differs(self, arguments: Any, buffers: dict[str, Tensor]) -> str | None:
        """Return how what the program wrote in place differs from what the forward wrote."""
        if objects_differ(arguments, self._given, lambda a, b: _tensor_difference(a, b) is not None):
            return "it leaves other values in an argument"
        return _buffers_differ(self.module, buffers)

    def recorded(self, forward: Callable[..., Any]) -> Records:
        """Make the call again and return what the module's submodules return; nothing else comes of it."""
        after, buffers_after = RandomState(self.surroundings.devices), _buffers(self.module)
        args, kwargs = self.arguments()
        records = Records()
        self.random.restore()
        _restore(self.module, self.buffers)
        try:
            records.hooked(self.module, lambda: in_clean_thread(lambda: self._run(lambda: forward(*args, **kwargs))))
        finally:
            after.restore()
            _restore(self.module, buffers_after)
        return records

    def _run(self, work: Callable[[], Any]) -> Any:
        with self.surroundings.active():
            return pytree.tree_map_only(Tensor, torch.Tensor.detach, work())


def difference(result: Any, expected: Any) -> str | None:
    """Return how two results differ; None if structure, dtypes and every bit agree (NaN equals NaN)."""
    leaves, structure = pytree.tree_flatten(result)
    others, expected_structure = pytree.tree_flatten(expected)
    if structure != expected_structure:
        return "the structure of the result differs"
    for one, other in zip(leaves, others, strict=True):
        found = _tensor_difference(one, other) if isinstance(other, Tensor) else _value_difference(one, other)
        if found is not None:
            return found
    return None


def _value_difference(one: Any, other: Any) -> str | None:
    if is_plain_object(one):
        differ = objects_differ(one, other, lambda a, b: _tensor_difference(a, b) is not None)
        return f"the {type(one).__name__} of the result differs" if differ else None
    return None if type(one) is type(other) and one == other else f"{one!r} instead of {other!r}"


def _tensor_difference(one: Any, other: Tensor) -> str | None:
    if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return "the shape or dtype of the result differs"
    if one.is_meta or torch.equal(one, other):
        return None
    same = (one == other) | ((one != one) & (other != other))
    if bool(same.all()):
        return None
    if not other.is_floating_point():
        return "the result differs"
    largest = (one.double() - other.double())[~same].abs().max().item()
    return f"the result differs by up to {largest:.2g}"


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def _restore(module: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in values and buffer.shape == values[name].shape and not torch.equal(buffer, values[name]):
                buffer.copy_(values[name])


def _buffers_differ(module: nn.Module, expected: dict[str, Tensor]) -> str | None:
    for name, buffer in module.named_buffers():
        if name not in expected or _tensor_difference(buffer, expected[name]) is not None:
            return f"it leaves other values in buffer {name}"
    return None
