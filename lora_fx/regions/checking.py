"""Run a program on the call that the forward has just answered, and compare the two bit by bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.arguments import flatten, rebuild
from lora_fx.capture.surroundings import RandomState, in_clean_thread, surroundings_of
from lora_fx.capture.torch_internals import pytree
from lora_fx.regions.program import Program


class Replay:
    """A call kept so that it can be made again: copies of its arguments, the buffers and the random state before it."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copies: dict[int, Tensor] = {}

        def keep(value: Any) -> Any:
            return copies.setdefault(id(value), _copy(value)) if isinstance(value, Tensor) else value

        self.module = module
        self.args, self.kwargs = rebuild(args, kwargs, keep)
        self._given = [leaf.value for leaf in flatten(args, kwargs).tensors()]
        tensors = [*copies.values(), *module.parameters()]
        self.surroundings = surroundings_of({tensor.device for tensor in tensors})
        self.random = RandomState(self.surroundings.devices)
        self.buffers = _buffers(module)

    def difference(self, program: Program, inputs: tuple[Tensor, ...], answer: Any) -> str | None:
        """Return how the program's result differs from `answer`, which the forward gave; None if not at all.

        Buffers and random state are left as the forward left them.
        """
        after, buffers_after = RandomState(self.surroundings.devices), _buffers(self.module)
        self.random.restore()
        _restore(self.module, self.buffers)
        try:
            result = in_clean_thread(lambda: self._run(lambda: program.function(self.module, *inputs)))
            if RandomState(self.surroundings.devices) != after:
                return "it draws other random numbers"
            return difference(result, answer) or self._left_behind_differs(buffers_after)
        except Exception as error:
            return f"it fails: {type(error).__name__}: {str(error)[:200]}"
        finally:
            after.restore()
            _restore(self.module, buffers_after)

    def _left_behind_differs(self, buffers: dict[str, Tensor]) -> str | None:
        """Return how what the program wrote in place differs from what the forward wrote."""
        copies = [leaf.value for leaf in flatten(self.args, self.kwargs).tensors()]
        for mine, given in zip(copies, self._given, strict=True):
            if _tensor_difference(mine, given) is not None:
                return "it leaves other values in an argument"
        return _buffers_differ(self.module, buffers)

    def _run(self, work: Callable[[], Any]) -> Any:
        with self.surroundings.active():
            return pytree.tree_map_only(Tensor, torch.Tensor.detach, work())


def prove_sizes_of_one(program: Program, module: nn.Module, forward: Callable[..., Any], replay: Replay) -> None:
    """Find out for which symbolic sizes the program is also right when they are 1, by trying.

    A capture assumes that symbolic sizes are at least 2 (1 broadcasts); mostly the graph holds for 1 as well.
    """
    symbols = sorted({symbol for each in program.captured.inputs for symbol in each.symbols if symbol is not None})
    most = len(symbols) if len(symbols) <= _MOST_SYMBOLS else 1
    for number in range(1, most + 1):
        for chosen in itertools.combinations(symbols, number):
            if _holds_at_one(program, module, forward, replay, frozenset(chosen)):
                program.ones.add(frozenset(chosen))


_MOST_SYMBOLS = 3


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
        again = program.guard.match_ones(module, small.args, small.kwargs)
        return not isinstance(again, int) and small.difference(program, again, answer) is None
    except Exception:  # the forward itself refuses such a size
        return False
    finally:
        before.restore()
        _restore(module, small.buffers)


def _narrowed(program: Program, replay: Replay, chosen: frozenset[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the replay's arguments with the chosen symbolic sizes cut to 1."""
    symbols = dict(
        zip(map(id, _unique_tensors(replay)), (each.symbols for each in program.captured.inputs), strict=True)
    )
    cut: dict[int, Tensor] = {}

    def narrow(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in cut:
            small = value.detach()
            for dim, symbol in enumerate(symbols[id(value)]):
                if symbol in chosen:
                    small = small.narrow(dim, 0, 1)
            cut[id(value)] = small.clone().requires_grad_(value.requires_grad)
        return cut[id(value)]

    return rebuild(replay.args, replay.kwargs, narrow)


def _unique_tensors(replay: Replay) -> list[Tensor]:
    tensors = {id(leaf.value): leaf.value for leaf in flatten(replay.args, replay.kwargs).tensors()}
    return list(tensors.values())


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
