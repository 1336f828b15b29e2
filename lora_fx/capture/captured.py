"""Capture: one submodule and one real call → a graph, and everything that the graph relies on."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.capture.arguments import Check, FlatCall, Leaf, flatten, is_constant, positional_names, rebuild
from lora_fx.capture.outputs import write_output
from lora_fx.capture.surroundings import Surroundings, in_clean_thread, surroundings_of
from lora_fx.capture.torch_internals import Fakes, quiet_fakes, symbol_of
from lora_fx.capture.tracer import Log, Specialised, Tracer, reason_of
from lora_fx.capture.writer import Untraceable
from lora_fx.swap import original_class

_LOCK = threading.RLock()
_MOST_RESTARTS = 24

VaryingSizes = frozenset[tuple[int, int]]
"""(input, dimension) pairs whose size is known to differ from call to call."""


class NotCaptured(Exception):
    """This call of this submodule cannot be captured; the text is the reason.  An outcome: the module runs as it is."""


@dataclass(frozen=True, slots=True)
class TensorInput:
    """A graph input: where the tensor is among the arguments, and what was assumed of it."""

    access: str
    name: str
    shape: tuple[int, ...]
    """The sizes of the call that was captured."""
    symbols: tuple[str | None, ...]
    """For each dimension the name of its symbolic size; None where the size is fixed."""
    dtype: torch.dtype | None
    """None, as the device: captured without inputs, nothing is assumed of them."""
    device: torch.device | None
    requires_grad: bool
    contiguous: bool


@dataclass(frozen=True, slots=True)
class Captured:
    """A submodule's forward as a graph, with call_module nodes for its leaves, and what the graph relies on."""

    graph: fx.Graph
    inputs: tuple[TensorInput, ...]
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
        if not isinstance(leaf.value, Tensor) and not is_constant(leaf.value):
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
        self.fakes = Fakes()
        self.tracer = Tracer(module, self.fakes, opaque)
        self.fake_of: dict[int, Tensor] = {}
        self.tensors: list[Leaf] = []
        self.same: list[tuple[str, str]] = []

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], around: Surroundings) -> Captured:
        self._make_inputs()
        fake_args, fake_kwargs = rebuild(args, kwargs, lambda leaf: self.fake_of.get(id(leaf), leaf))
        result = self.tracer.run(fake_args, fake_kwargs)
        write_output(self.tracer.writer, result)
        self.tracer.writer.drop_unused()
        return Captured(
            graph=self.tracer.writer.graph,
            inputs=tuple(self._input(leaf) for leaf in self.tensors),
            same=tuple(self.same),
            constants=tuple(leaf for leaf in self.flat.leaves if not isinstance(leaf.value, Tensor)),
            structure=tuple(self.flat.structure),
            size_guards=tuple(self._size_guards()),
            log=self.tracer.log,
            surroundings=around,
            owned={name: _facts(self.tracer.module, name) for name in sorted(self.tracer.log.owned)},
            example=rebuild(args, kwargs, _stub),
        )

    def _make_inputs(self) -> None:
        first: dict[int, Leaf] = {}
        for leaf in self.flat.tensors():
            if id(leaf.value) in first:
                self.same.append((leaf.access, first[id(leaf.value)].access))
                continue
            first[id(leaf.value)] = leaf
            name = re.sub(r"\W+", "_", leaf.name).strip("_")
            fake = self.fakes.tensor(_detached(leaf.value), name, [False] * leaf.value.dim())
            self._note_varying(len(self.tensors), fake)
            self.fake_of[id(leaf.value)] = fake
            self.tensors.append(leaf)
            self.tracer.writer.placeholder(name, fake)

    def _note_varying(self, index: int, fake: Tensor) -> None:
        for dim, size in enumerate(fake.shape):
            if (index, dim) in self.varying and isinstance(size, torch.SymInt):
                self.tracer.varying.append(symbol_of(size))

    def _input(self, leaf: Leaf) -> TensorInput:
        fake = self.fake_of[id(leaf.value)]
        symbols = tuple(str(symbol_of(s)) if isinstance(s, torch.SymInt) else None for s in fake.shape)
        value = leaf.value
        return TensorInput(
            leaf.access, leaf.name, tuple(value.shape), symbols,
            value.dtype, value.device, value.requires_grad, value.is_contiguous(),
        )  # fmt: skip

    def _size_guards(self) -> Iterable[str]:
        sizes: list[torch.SymInt] = []
        names: list[str] = []
        for index, leaf in enumerate(self.tensors):
            for dim, size in enumerate(self.fake_of[id(leaf.value)].shape):
                if isinstance(size, torch.SymInt):
                    sizes.append(size)
                    names.append(size_name(index, dim))
                else:
                    yield f"{size_name(index, dim)} == {size}"
        yield from self.fakes.guards(sizes, names)


def size_name(index: int, dim: int) -> str:
    """Return the name that size guards use for a dimension of an input."""
    return f"s{index}_{dim}"


def _detached(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _facts(module: nn.Module, name: str) -> tuple[torch.Size, torch.dtype, torch.device]:
    tensor = resolve(module, name)
    return (tensor.shape, tensor.dtype, tensor.device)


def resolve(module: nn.Module, name: str) -> Any:
    """Return what a dotted path names: a submodule, a tensor or another attribute."""
    return functools.reduce(getattr, name.split("."), module)


def _stub(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    stub = torch.empty_like(value, device="meta", memory_format=torch.preserve_format)
    return stub.requires_grad_(value.requires_grad)


def varying_sizes(before: Sequence[TensorInput], tensors: Sequence[Tensor]) -> VaryingSizes:
    """Return where the sizes of the tensors differ from those of an earlier capture of the same structure."""
    return frozenset(
        (index, dim)
        for index, (each, tensor) in enumerate(zip(before, tensors, strict=True))
        for dim, size in enumerate(tensor.shape)
        if len(each.shape) == tensor.dim() and each.shape[dim] != size
    )
