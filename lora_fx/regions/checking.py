"""Run a program on the call that the forward has just answered, and compare the two bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.arguments import flatten
from lora_fx.capture.guards import Match
from lora_fx.capture.inputs import TensorInput
from lora_fx.capture.objects import copied, is_plain_object, objects_differ, tensors_in
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

    def _run(self, work: Callable[[], Any]) -> Any:
        with self.surroundings.active():
            return pytree.tree_map_only(Tensor, torch.Tensor.detach, work())


def prove_sizes_of_one(program: Program, module: nn.Module, forward: Callable[..., Any], replay: Replay) -> None:
    """Find out for which symbolic sizes the program is also right when they are 1, by trying.

    A capture assumes that symbolic sizes are at least 2 (1 broadcasts); mostly the graph holds for 1 as well.
    """
    symbols = sorted(_symbols(program, inside_objects=False) - _symbols(program, inside_objects=True))
    most = len(symbols) if len(symbols) <= _MOST_SYMBOLS else 1
    for number in range(1, most + 1):
        for chosen in itertools.combinations(symbols, number):
            if _holds_at_one(program, module, forward, replay, frozenset(chosen)):
                program.ones.add(frozenset(chosen))


_MOST_SYMBOLS = 3


def _symbols(program: Program, inside_objects: bool) -> set[str]:
    captured = program.captured
    inputs = captured.inputs[captured.tensors :] if inside_objects else captured.inputs[: captured.tensors]
    return {s for each in inputs if isinstance(each, TensorInput) for s in each.symbols if s is not None}


def _holds_at_one(
    program: Program, module: nn.Module, forward: Callable[..., Any], replay: Replay, chosen: frozenset[str]
) -> bool:
    args, kwargs = _narrowed(program, replay, chosen)
    inputs = program.guard.match_ones(module, args, kwargs)
    if isinstance(inputs, int) or program.ones_of(inputs) != chosen:
        return False
    small = Replay(module, args, kwargs)
    before = RandomState(replay.surroundings.devices)
    try:
        with replay.surroundings.active():
            answer = in_clean_thread(lambda: small._run(lambda: forward(*args, **kwargs)))
        return small.difference(program, program.guard.match_ones, answer) is None
    except Exception:  # the forward itself refuses such a size
        return False
    finally:
        before.restore()
        _restore(module, small.buffers)


def _narrowed(program: Program, replay: Replay, chosen: frozenset[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the replay's arguments with the chosen symbolic sizes of its tensors cut to 1."""
    tensors = {id(leaf.value): leaf.value for leaf in flatten(replay.args, replay.kwargs).tensors()}
    given = program.captured.inputs[: program.captured.tensors]
    symbols = {key: each.symbols for key, each in zip(tensors, given, strict=True) if isinstance(each, TensorInput)}

    def narrow(value: Tensor) -> Tensor:
        small = value.detach()
        for dim, symbol in enumerate(symbols.get(id(value), ())):
            if symbol in chosen:
                small = small.narrow(dim, 0, 1)
        return small.clone().requires_grad_(value.requires_grad)

    narrowed: tuple[tuple[Any, ...], dict[str, Any]] = copied((replay.args, replay.kwargs), narrow)
    return narrowed


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
