"""The inputs of a graph: tensors among the arguments, and what is found inside objects among them."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lora_fx.capture.calls.arguments import FlatCall, GuardCheck, Leaf, is_constant
from lora_fx.capture.reads.opennumbers import OpenNumber
from lora_fx.capture.tracing.proxies import Proxies, access_of
from lora_fx.capture.tracing.writer import GraphWriter
from lora_fx.models.torch_internals import Fakes, symbol_of

VaryingSizes = frozenset[tuple[int, int]]
"""(input, dimension) pairs whose size is known to differ from call to call."""


@dataclass(frozen=True, slots=True)
class TensorInput:
    """Where a tensor is among the arguments, and what was assumed of it."""

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
class NumberInput:
    """Where an integer is inside an object among the arguments; `symbol` is None where its value is fixed."""

    access: str
    name: str
    value: int
    symbol: str | None


@dataclass(frozen=True, slots=True)
class ObjectInput:
    """Where an object is among the arguments that the graph hands on or writes to."""

    access: str
    name: str


Input = TensorInput | NumberInput | ObjectInput


@dataclass(slots=True)
class _Given:
    access: str
    name: str
    value: Any
    stand_in: Any


@dataclass(slots=True)
class Inputs:
    """The inputs of one capture: some are known before it, others turn up while the forward reads an object."""

    fakes: Fakes
    writer: GraphWriter
    listening: Callable[[], bool]
    quietly: Callable[[], AbstractContextManager[None]]
    """While it is entered, the tracer does not listen."""
    given: list[_Given] = field(default_factory=list)
    stand_ins: dict[int, Any] = field(default_factory=dict)
    """Fake or proxy by the identity of an argument's tensor or object."""
    same: list[tuple[str, str]] = field(default_factory=list)
    constants: list[Leaf] = field(default_factory=list)
    checks: dict[GuardCheck, None] = field(default_factory=dict)
    proxies: Proxies = field(init=False)

    def __post_init__(self) -> None:
        self.proxies = Proxies(self)
        self.writer.ask_object = self._object

    def admit(self, flat: FlatCall) -> None:
        """Make inputs of the tensors, proxies of the objects and guards of the constants among the leaves of a call."""
        for leaf in flat.tensors():
            self.stand_ins[id(leaf.value)] = self._tensor(leaf.access, leaf.name, leaf.value)
        for leaf in flat.leaves:
            if not isinstance(leaf.value, Tensor) and not is_constant(leaf.value):
                self.stand_ins[id(leaf.value)] = self.proxies.of(leaf.value, leaf.access)
            elif is_constant(leaf.value):
                self.constants.append(leaf)

    def symbols(self, varying: VaryingSizes) -> Iterator[Any]:
        """Yield the symbols of the given sizes of the inputs admitted so far."""
        for index, dim in varying:
            size = self.given[index].stand_in.shape[dim]
            if isinstance(size, torch.SymInt):
                yield symbol_of(size)

    def inputs(self) -> tuple[Input, ...]:
        """Return the inputs, with what the capture has assumed of them."""
        return tuple(map(_input, self.given))

    def size_guards(self) -> Iterator[str]:
        """Yield Python expressions over `size_name`s that must all hold."""
        sizes: list[torch.SymInt] = []
        names: list[str] = []
        for index, given in enumerate(self.given):
            for dim, size in enumerate(_sizes(given)):
                if isinstance(size, torch.SymInt):
                    sizes.append(size)
                    names.append(size_name(index, dim))
                else:
                    yield f"{size_name(index, dim)} == {size}"
        yield from self.fakes.guards(sizes, names)

    # -- what turns up while the forward runs (the Host of the proxies)

    def tensor_read(self, access: str, tensor: Tensor) -> Tensor:
        with self.quietly():
            return self._tensor(access, _spoken(access), tensor)

    def number_read(self, access: str, number: int) -> Any:
        stand_in = self.fakes.number(number, _identifier(access))
        self._give(access, _spoken(access), number, stand_in)
        return stand_in

    def constant_read(self, access: str, value: object) -> None:
        self.constants.append(Leaf(access, _spoken(access), value))

    def required(self, expression: str, reason: str) -> None:
        self.checks[GuardCheck(expression, reason)] = None

    def wrote(self, function: Callable[..., None], proxy: Any, key: object, value: object) -> None:
        if self.listening():
            given = self._number(key) if type(key) is OpenNumber else key
            args = (self.writer.argument(proxy), given, self.writer.argument(value))
            self.writer.emit("call_function", function, args)

    # -- making inputs

    def _tensor(self, access: str, name: str, value: Tensor) -> Tensor:
        known = next((given for given in self.given if given.value is value), None)
        if known is not None:
            self.same.append((access, known.access))
            fake: Tensor = known.stand_in
            return fake
        fake = self.fakes.tensor(value, _identifier(name), [False] * value.dim())
        self._give(access, name, value, fake)
        return fake

    def _number(self, number: OpenNumber) -> fx.Node:
        """Return the node of an open number by which an item is set."""
        known = self.writer.inputs.get(id(number))
        return known or self._give(number.text, _spoken(number.text), number.value, number)

    def _object(self, proxy: Any) -> fx.Node:
        """Return the node of an object that the graph mentions."""
        access = access_of(proxy)
        return self._give(access, _spoken(access), None, proxy)

    def _give(self, access: str, name: str, value: Any, stand_in: Any) -> fx.Node:
        self.given.append(_Given(access, name, value, stand_in))
        return self.writer.input(_identifier(name), stand_in)


def size_name(index: int, dim: int) -> str:
    """Return the name that size guards use for a dimension of an input (dimension 0 of a number is the number)."""
    return f"s{index}_{dim}"


def _sizes(given: _Given) -> tuple[Any, ...]:
    if isinstance(given.stand_in, Tensor):
        return tuple(given.stand_in.shape)
    return (given.stand_in,) if isinstance(given.stand_in, torch.SymInt) else ()


def _input(given: _Given) -> Input:
    value, stand_in = given.value, given.stand_in
    if isinstance(stand_in, torch.SymInt):
        return NumberInput(given.access, given.name, value, _symbol(stand_in))
    if type(stand_in) is OpenNumber:
        return NumberInput(given.access, given.name, value, None)
    if not isinstance(stand_in, Tensor):
        return ObjectInput(given.access, given.name)
    symbols = tuple(_symbol(size) for size in stand_in.shape)
    return TensorInput(
        given.access, given.name, tuple(value.shape), symbols,
        value.dtype, value.device, value.requires_grad, value.is_contiguous(),
    )  # fmt: skip


def _symbol(size: Any) -> str | None:
    return str(symbol_of(size)) if isinstance(size, torch.SymInt) else None


def _spoken(access: str) -> str:
    """Return an access as people say it: `past_key_values.layers[0].keys`."""
    spoken = re.sub(r"^kwargs\['(\w+)'\]", r"\1", access.replace("«", "").replace("»", ""))
    return re.sub(r"^args\[(\d+)\]", r"argument \1", spoken)


def _identifier(name: str) -> str:
    return re.sub(r"\W+", "_", _spoken(name)).strip("_")
