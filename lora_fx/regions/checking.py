"""Run a program on the call that the forward has just answered, and compare the two bit by bit.

Both run on stand-ins, copies of the block, so that a comparison leaves no trace in the user's model.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import STATE, all_attached, is_adapted
from lora_fx.adapters.trained import added_rows
from lora_fx.capture.calls.ambient import RandomState, ambient_state, in_clean_thread
from lora_fx.capture.calls.objects import copied, is_plain_object, objects_differ, tensors_in
from lora_fx.capture.guards import Match
from lora_fx.capture.tracing.copies import copied_module
from lora_fx.capture.tracing.recording import Records
from lora_fx.liveness.heads import LATE, uninstall
from lora_fx.models.swap import Swapped, take_off
from lora_fx.models.torch_internals import pytree
from lora_fx.models.walking import devices_of, modules_of, named_buffers_of
from lora_fx.regions.gradients import Run, gradients_differ, rounded_otherwise, values_differ
from lora_fx.regions.program import Program
from lora_fx.regions.thin import ThinLinears

REGION = "lora_fx_region"
"""Attribute of a module that is a region."""
PREFIX = "lora_fx_prefix"
"""Attribute of a region whose output is kept for data that comes again."""
_NOISE = 0.02


@dataclass(slots=True)
class ModuleCall:
    """A call of a region's module, and the forward that the module has without the region."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def by_forward(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def matched(self, match: Match) -> tuple[Any, ...] | int:
        """Return the inputs of a graph that fits the call, or which of its guard's reasons speaks against it."""
        return match(self.module, self.args, self.kwargs)


class RunsGraphs(Swapped, nn.Module):
    """Base of the mixin for the module of a region."""


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


class Replay:
    """A call kept so that it can be made again: copies of module, arguments and random state as they were before it."""

    def __init__(self, call: ModuleCall, thin: ThinLinears | None = None) -> None:
        """Keep a call; `thin` if large products are thin in it, and are to be so again."""
        self._given, self._thin = call, thin
        self._before = stand_in(call.module)
        args, kwargs = copied((call.args, call.kwargs), _copy)
        self.call = ModuleCall(call.module, call.forward, args, kwargs)
        devices = {tensor.device for tensor in tensors_in((call.args, call.kwargs))} | devices_of(call.module)
        self.ambient = ambient_state(devices)
        self.random = RandomState(self.ambient.devices)

    def again(self, copy: Callable[[Tensor], Tensor] = _copy, module: nn.Module | None = None) -> ModuleCall:
        """Return the call with a copy of the arguments and, unless one is given, of the module: a forward may write
        to both.
        """
        module = stand_in(self._before) if module is None else module
        return ModuleCall(module, module.forward, *copied((self.call.args, self.call.kwargs), copy))

    def answered_alone(self) -> Any:
        """Return what a stand-in of the module answers, with which programs are compared from now on.

        In the place of a call that was made for real: random state is as after it.
        """
        self._given = self.again()
        self.random.restore()
        return self.run(self._given.by_forward)

    def difference(self, program: Program, match: Match, answer: Any) -> str | None:
        """Return how the program differs from the forward, which gave `answer`; None if not at all.

        The program makes the same call; then both make it with factors that show in the place of the adapters' own.
        A copy of the module runs, and random state is left as the forward left it.
        """

        def compared(after: RandomState) -> str | None:
            reason = self._differs_from_answer(program, match, answer, after)
            return reason or self._differs_with_noise(program, match)

        return self.without_trace(compared)

    def fast_difference(self, function: Callable[..., Any], match: Match, halves: bool = False) -> str | None:
        """Return how other code of a program differs from the forward, gradients included, but for rounding.

        Both run on copies, with factors that show in the adapters; random state is left as it was.

        Args:
            function: called with the module and the graph's inputs.
            match: of the program.
            halves: whether gradients are those of values that were rounded to bfloat16.
        """
        return self.without_trace(lambda _: self._fast_differs(function, match, halves))

    def without_trace(self, compared: Callable[[RandomState], str | None]) -> str | None:
        """Return what a comparison finds, or its failure; it is given the random state, which is restored after it."""
        after = RandomState(self.ambient.devices)
        try:
            return compared(after)
        except Exception as error:
            return f"it fails: {type(error).__name__}: {str(error)[:200]}"
        finally:
            after.restore()

    def _differs_from_answer(self, program: Program, match: Match, answer: Any, after: RandomState) -> str | None:
        mine = self.again(module=self._before if program.leaves_module else None)
        inputs = match(self.call.module, mine.args, mine.kwargs)
        if isinstance(inputs, int):
            return f"its own guard refuses it: {program.guard.reasons[inputs]}"
        self.random.restore()
        result = self.run(lambda: _detached(program.function(mine.module, *inputs)))
        if RandomState(self.ambient.devices) != after:
            return "it draws other random numbers"
        return difference(result, answer) or _left_behind_differs(mine, self._given)

    def _differs_with_noise(self, program: Program, match: Match) -> str | None:
        """Return how program and forward differ with other factors in the adapters, gradients included."""
        module = self.call.module
        if program.proven_with_noise or not is_adapted(module):
            return None
        if any(device.type == "meta" for device in devices_of(module)):
            return None
        mine, theirs, _ = self.both_with_noise(program.function, match)
        reason = difference(_detached(mine[0]), _detached(theirs[0]))
        if reason is None and self.ambient.grad:
            reason = self.run(lambda: gradients_differ(mine, theirs))  # a backward runs in the thread that asks for it
        program.proven_with_noise = reason is None
        return None if reason is None else f"with other adapters, {reason}"

    def _fast_differs(self, function: Callable[..., Any], match: Match, halves: bool) -> str | None:
        mine, theirs, alike = self.both_with_noise(function, match)
        if not alike:
            return "it draws other random numbers"
        precision = self.precision(theirs[0])
        different = values_differ(mine[0], theirs[0], precision)
        precision = torch.bfloat16 if halves else precision
        return different or self.run(lambda: gradients_differ(mine, theirs, precision, self.shaken))

    def both_with_noise(self, function: Callable[..., Any], match: Match) -> tuple[Run, Run, bool]:
        """Run a program's code and the forward on copies with other factors; say whether both draw alike."""
        mine, theirs = self.again(), self.again()
        with_noise(mine.module)
        with_noise(theirs.module)
        inputs = match(self.call.module, mine.args, mine.kwargs)
        assert not isinstance(inputs, int)
        self.random.restore()
        expected = self.run(theirs.by_forward)
        drawn = RandomState(self.ambient.devices)
        self.random.restore()
        result = self.run(lambda: function(mine.module, *inputs))
        alike = RandomState(self.ambient.devices) == drawn
        return (
            (result, (mine.args, mine.kwargs), mine.module),
            (expected, (theirs.args, theirs.kwargs), theirs.module),
            alike,
        )

    def shaken(self) -> Run:
        """Run the forward with noise as factors, on inputs that are rounded otherwise."""
        call = self.again(rounded_otherwise)
        with_noise(call.module)
        self.random.restore()
        return call.by_forward(), (call.args, call.kwargs), call.module

    def precision(self, result: Any) -> torch.dtype:
        """Return the coarsest dtype in which the call rounds."""
        tensors = (*tensors_in((result, self.call.args, self.call.kwargs)), *self.call.module.parameters())
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        dtypes |= {dtype for _, enabled, dtype in self.ambient.autocast if enabled}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def recorded(self) -> Records:
        """Make the call again and return what the module's submodules return; nothing else comes of it."""
        after = RandomState(self.ambient.devices)
        call, records = self.again(), Records()
        self.random.restore()
        try:
            records.hooked(call.module, lambda: self.run(call.by_forward))
        finally:
            after.restore()
        return records

    def run(self, work: Any) -> Any:
        def run() -> Any:
            with self.ambient.active(), ThinLinears(self._thin.purpose) if self._thin else contextlib.nullcontext():
                return work()

        return in_clean_thread(run)


def _detached(result: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.Tensor.detach, result)


def _left_behind_differs(mine: ModuleCall, theirs: ModuleCall) -> str | None:
    """Return how what the program wrote in place differs from what the forward wrote."""
    if _objects_differ((mine.args, mine.kwargs), (theirs.args, theirs.kwargs)):
        return "it leaves other values in an argument"
    expected = dict(named_buffers_of(theirs.module))
    for name, buffer in named_buffers_of(mine.module):
        if name not in expected or _tensor_difference(buffer, expected[name]) is not None:
            return f"it leaves other values in buffer {name}"
    return None


def difference(result: Any, expected: Any) -> str | None:
    """Return how two results differ; None if structure, dtypes and every bit agree (NaN equals NaN)."""
    leaves, structure = pytree.tree_flatten(result)
    others, expected_structure = pytree.tree_flatten(expected)
    if structure != expected_structure:
        return "the structure of the result differs"
    for one, other in zip(leaves, others, strict=True):
        reason = _tensor_difference(one, other) if isinstance(other, Tensor) else _value_difference(one, other)
        if reason is not None:
            return reason
    return None


def _value_difference(one: Any, other: Any) -> str | None:
    if is_plain_object(one):
        return f"the {type(one).__name__} of the result differs" if _objects_differ(one, other) else None
    return None if type(one) is type(other) and one == other else f"{one!r} instead of {other!r}"


def _objects_differ(one: Any, other: Any) -> bool:
    return objects_differ(one, other, lambda a, b: _tensor_difference(a, b) is not None)


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


def stand_in(module: nn.Module) -> nn.Module:
    """Return a copy of a block that shares its parameters, has buffers of its own, and runs no graphs."""
    duplicate = copied_module(module)
    for inner in modules_of(duplicate):
        own = inner.__dict__
        if LATE in own:
            uninstall(inner)
        own.pop(PREFIX, None)
        if own.pop(REGION, None) is not None:
            take_off(inner, RunsGraphs)
    return duplicate


def with_noise(duplicate: nn.Module) -> None:
    """Put factors that show into every adapter of a stand-in.

    With B = 0, as adapters start, a graph that leaves one out or feeds it the wrong input would look right.
    """
    generator = torch.Generator().manual_seed(0)
    for module in modules_of(duplicate):
        if STATE in module.__dict__:
            module.__dict__[STATE].switch.act_everywhere()
    for _, adapter in all_attached(duplicate):
        for factor in (adapter.lora_A, adapter.lora_B):
            noise = torch.randn(factor.weight.shape, generator=generator, dtype=torch.float32) * _NOISE
            factor.weight = nn.Parameter(noise.to(factor.weight), factor.weight.requires_grad)
    for rows in {id(rows): rows for _, _, rows in added_rows(duplicate)}.values():
        noise = torch.randn(rows.rows.shape, generator=generator, dtype=torch.float32) * _NOISE
        rows.rows = nn.Parameter(rows.rows.detach() + noise.to(rows.rows), rows.rows.requires_grad)
