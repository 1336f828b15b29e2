"""Capture: one submodule and one real call → a graph, and everything that the graph relies on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.capture.arguments import Check, FlatCall, Leaf, flatten, is_constant, positional_names, rebuild
from lora_fx.capture.copies import Place
from lora_fx.capture.inputs import Input, Inputs, TensorInput, VaryingSizes
from lora_fx.capture.objects import copied, is_plain_object
from lora_fx.capture.outputs import write_output
from lora_fx.capture.reasons import Untraceable, reason_of
from lora_fx.capture.surroundings import Surroundings, in_clean_thread, surroundings_of
from lora_fx.capture.torch_internals import Fakes, quiet_fakes
from lora_fx.capture.tracer import Log, Specialised, Tracer
from lora_fx.swap import original_class

_LOCK = threading.RLock()
_MOST_RESTARTS = 24


class NotCaptured(Exception):
    """This call of this submodule cannot be captured; the text is the reason.  An outcome: the module runs as it is."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A submodule's forward as a graph, with call_module nodes for its leaves, and what the graph relies on."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    """What the guard finds and the graph is given; the first ones are the `tensors` arguments of the call."""
    tensors: int
    same: tuple[tuple[str, str], ...]
    """Pairs of accesses that gave one and the same tensor."""
    constants: tuple[Leaf, ...]
    structure: tuple[Check, ...]
    size_guards: tuple[str, ...]
    """Expressions over `s<input>_<dimension>`."""
    log: Log
    surroundings: Surroundings | None
    """None: does not matter to the graph."""
    owned: dict[str, tuple[torch.Size, torch.dtype, torch.device]]
    """Facts of the module's own tensors that the forward asked for."""
    parameters: tuple[Place, ...]
    """Integers of the module that accesses use as an index, as `[«place»]`: the layer's number in a KV cache."""
    example: tuple[tuple[Any, ...], dict[str, Any]] | None
    """The captured call with meta tensors: enough to capture the same call of another model."""


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: VaryingSizes = frozenset(),
) -> Captured:
    """Return the forward of the module for calls like this one, as a graph; module and arguments stay unchanged.

    Args:
        module: the submodule; its forward runs on a private copy, with fake tensors.
        args: positional arguments of a real call; only facts about them are used, not their values.
        kwargs: keyword arguments.
        varying: sizes that are known to vary; a part of the forward that turns one into a constant stays a call.

    Raises:
        NotCaptured: with the reason.
    """
    flat = flatten(args, kwargs, positional_names(original_class(module).forward)[1:])
    _refuse_opaque(flat)
    around = surroundings_of({leaf.value.device for leaf in flat.tensors()})

    def work() -> Captured:
        with around.active():
            return _with_retreats(module, args, kwargs, flat, varying, around)

    with _LOCK, quiet_fakes():
        return in_clean_thread(work)


def _refuse_opaque(flat: FlatCall) -> None:
    for leaf in flat.leaves:
        plain = isinstance(leaf.value, Tensor) or is_constant(leaf.value) or is_plain_object(leaf.value)
        if not plain:
            raise NotCaptured(f"argument {leaf.name} is of type {type(leaf.value).__name__}")
        if isinstance(leaf.value, Tensor) and type(leaf.value) not in (Tensor, nn.Parameter):
            raise NotCaptured(f"argument {leaf.name} is of the tensor subclass {type(leaf.value).__name__}")


def _with_retreats(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    flat: FlatCall,
    varying: VaryingSizes,
    around: Surroundings,
) -> Captured:
    """Capture; where a submodule bakes in a varying size, start again with that submodule as one opaque call."""
    opaque: set[str] = set()
    for _ in range(_MOST_RESTARTS):
        try:
            return _Capture(module, flat, varying, frozenset(opaque)).run(args, kwargs, around)
        except Specialised as found:
            if not found.path:
                raise NotCaptured("the forward turns a varying size into a constant") from None
            opaque.add(found.path)
        except (Untraceable, Exception) as error:
            raise NotCaptured(reason_of(error)) from error
    raise NotCaptured(f"more than {_MOST_RESTARTS} submodules turn a varying size into a constant")


class _Capture:
    """One attempt."""

    def __init__(self, module: nn.Module, flat: FlatCall, varying: VaryingSizes, opaque: frozenset[str]) -> None:
        self.flat = flat
        self.varying = varying
        self.tracer = tracer = Tracer(module, Fakes(), opaque)
        self.inputs = Inputs(tracer.fakes, tracer.writer, lambda: tracer.listening)
        tracer.ghosts = self.inputs.ghosts

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], around: Surroundings) -> Captured:
        self.inputs.admit(self.flat)
        tensors = sum(isinstance(each.stand_in, Tensor) for each in self.inputs.given)
        self.tracer.varying = list(self.inputs.symbols(self.varying))
        stand_ins = self.inputs.stand_ins
        result = self.tracer.run(*rebuild(args, kwargs, lambda leaf: stand_ins.get(id(leaf), leaf)))
        write_output(self.tracer.writer, result)
        self.tracer.writer.drop_unused()
        return Captured(
            graph=self.tracer.writer.graph,
            inputs=self.inputs.inputs(),
            tensors=tensors,
            same=tuple(self.inputs.same),
            constants=tuple(self.inputs.constants),
            structure=(*self.flat.structure, *self.inputs.checks),
            size_guards=tuple(self.inputs.size_guards()),
            log=self.tracer.log,
            surroundings=around,
            owned={name: _facts(self.tracer.module, name) for name in sorted(self.tracer.log.owned)},
            parameters=(),
            example=rebuild(args, kwargs, _stub),
        )


def _facts(module: nn.Module, name: str) -> tuple[torch.Size, torch.dtype, torch.device]:
    tensor = resolve(module, name)
    return (tensor.shape, tensor.dtype, tensor.device)


def resolve(module: nn.Module, name: str) -> Any:
    """Return what a dotted path names: a submodule, a tensor or another attribute."""
    return functools.reduce(getattr, name.split("."), module)


def _stub(value: Any) -> Any:
    return value if is_constant(value) else copied(value, _meta)


def _meta(value: Tensor) -> Tensor:
    stub = torch.empty_like(value, device="meta", memory_format=torch.preserve_format)
    return stub.requires_grad_(value.requires_grad)


def varying_sizes(before: Captured, tensors: Sequence[Tensor]) -> VaryingSizes:
    """Return where the sizes of a call's tensors differ from those of an earlier capture of the same structure."""
    if before.tensors != len(tensors) or before.same:
        return frozenset()
    return frozenset(
        (index, dim)
        for index, (each, tensor) in enumerate(zip(before.inputs[: before.tensors], tensors, strict=True))
        for dim, size in enumerate(tensor.shape)
        if isinstance(each, TensorInput) and len(each.shape) == tensor.dim() and each.shape[dim] != size
    )
