"""Guards: everything that a captured graph relies on, compiled into one Python function.

The function takes the module, args and kwargs of a call and returns the graph's inputs, or the number of the first
check that failed.  It is plain Python with plain names, so that a hit costs microseconds.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import Leaf, is_constant
from lora_fx.capture.captured import Captured
from lora_fx.capture.reads.frozen import Freezer, Frozen, Inside, OfType
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.inputs import NumberInput, TensorInput, size_name
from lora_fx.liveness.rows import LazyRows
from lora_fx.models.code import attribute
from lora_fx.models.torch_internals import global_hook_tables, shape_guard_names

_AT_LEAST_TWO = re.compile(r"^2 <= (?=s(\d+)_\d+($| and ))")
_FAILURES = "(AttributeError, KeyError, IndexError, TypeError)"


Match = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | int]
"""Returns the graph's inputs, or the index of the reason why this call is not its own."""


@dataclass(frozen=True, slots=True)
class Guard:
    """The compiled checks of one graph."""

    match: Match
    match_ones: Match
    """The same, but sizes that the capture took to be at least 2 may be 1 too."""
    match_unproven: Match
    """As `match_ones`, and for any values of the module's integers that the graph has as parameters."""
    reasons: tuple[str, ...]
    source: str
    proven: set[tuple[int, ...]]
    """The values of these integers for which the graph has been proven."""
    codes: tuple[CodeType, ...]
    """Of the three functions."""
    names: Mapping[str, Any]
    """What the names in them stand for."""

    def anew(self) -> "Guard":
        """Return a guard of the same checks by which nothing has been proven."""
        return _guard(self.codes, self.names, self.reasons, self.source)


def compile_guard(
    captured: Captured, classes: Mapping[str, type], unset: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Guard:
    """Return the guard of a captured graph.

    Args:
        captured: the graph and what it relies on.
        classes: for each submodule whose own call the graph bypasses, the class that it must have.
        unset: the attributes of some of them that must be None.

    Returns:
        Three compiled functions, the reasons that their numbers stand for, and the source of the strictest.

    For a `Scale` with `forward(self, x): return x * self.factor`, called with a tensor [2, 5], the source is, with
    names `c<number>` for objects that no text can write, and checks of autocast, hooks and keyword arguments left out:

        def guard(self, args, kwargs):
          try:
            if not (len(args) == 1): return 1
            x0 = args[0]
            if not (type(x0) in Plain): return 3
            if not (x0.dtype is c6): return 4
            if not (x0.dim() == 2): return 6
            s0_0, s0_1, = x0.shape
            if not (2 <= s0_0): return 7
            if not (2 <= s0_1): return 8
            if not (type(self) is c12): return 13
            if not (type(self.factor) is c13 and self.factor == c14): return 16
          except (AttributeError, KeyError, IndexError, TypeError): return 18
          return (x0, )

    so a tensor of three dimensions gets 6, and `reasons[6]` is "number of dimensions of x".
    """
    writer = _GuardWriter(captured, classes, unset)
    lines, reasons = writer.write()
    sources = []
    for instead in ({}, writer.at_ones, writer.at_ones | writer.unproven):
        sources.append("\n".join([instead.get(number, line) for number, line in enumerate(lines)]))
    codes = tuple([compile(source, "<lora_fx guard>", "exec") for source in sources])
    return _guard(codes, writer.names, tuple(reasons), sources[0])


def _relaxed(clause: str, captured: Captured) -> str:
    size = _AT_LEAST_TWO.match(clause)
    if size is None or isinstance(captured.inputs[int(size[1])], NumberInput):
        return clause
    return _AT_LEAST_TWO.sub(r"1 <= ", clause)


def _guard(codes: tuple[CodeType, ...], names: Mapping[str, Any], reasons: tuple[str, ...], source: str) -> Guard:
    proven: set[tuple[int, ...]] = set()
    scopes = [{**names, "proven": proven} for _ in codes]
    for code, scope in zip(codes, scopes, strict=True):
        exec(code, scope)
    match, match_ones, match_unproven = [scope["guard"] for scope in scopes]
    return Guard(match, match_ones, match_unproven, reasons, source, proven, codes, names)


class _GuardWriter:
    """Writes the source of one guard."""

    def __init__(self, captured: Captured, classes: Mapping[str, type], unset: Mapping[str, Sequence[str]]) -> None:
        self.captured, self.classes, self.unset = captured, classes, unset
        self.names: dict[str, Any] = {**shape_guard_names, "Plain": (Tensor, nn.Parameter, LazyRows), "torch": torch}
        self.names["proven"] = ()  # each guard has a set of its own
        self.module_names: dict[str, str] = {}
        self.object_names: dict[AttributePath, str] = {}
        self.lines: list[str] = []
        self.reasons: list[str] = []
        self.at_ones: dict[int, str] = {}
        """What stands in the place of a line, by its number, where sizes may be 1 that the capture took for more."""
        self.unproven: dict[int, str] = {}
        """The same, where parameters may have any values."""
        self.freezer = Freezer()
        self.parameters = {f"«{place}»": f"p{index}" for index, place in enumerate(captured.parameters)}

    def write(self) -> tuple[list[str], list[str]]:
        """Return the lines of the source, of which `at_ones` and `unproven` tell others, and the reasons; once."""
        self.module_names = {"": "self"}
        self.lines = ["def guard(self, args, kwargs):", "  try:"]
        self._parameters()
        self._ambient()
        for check in self.captured.structure:
            self._check(check.expression, check.reason)
        self._inputs()
        self._identities()
        for clause in self.captured.size_guards:
            self._check(clause, f"size: {self._readable(clause)}", self.at_ones, _relaxed(clause, self.captured))
        for leaf in self.captured.constants:
            self._constant(leaf)
        self._modules()
        self._structure()
        self._reads()
        for source, frozen in self.captured.dependencies.outside.items():
            self._frozen(frozen, source.access(self._name(source.root)), source.name)
        inputs = "".join(f"x{index}, " for index in range(len(self.captured.inputs)))
        self.lines += [f"  except {_FAILURES}: return {len(self.reasons)}", f"  return ({inputs})"]
        return self.lines, [*self.reasons, "structure of the arguments"]

    def _check(
        self, expression: str, reason: str, others: dict[int, str] | None = None, instead: str | None = None
    ) -> None:
        """Write a check; in the place of the line, `others` get the same with the expression `instead`."""
        if others is not None and instead is not None:
            others[len(self.lines)] = self._line(instead)
        self.lines.append(self._line(expression))
        self.reasons.append(reason)

    def _line(self, expression: str) -> str:
        return f"    if not ({self._filled(expression)}): return {len(self.reasons)}"

    def _bind(self, name: str, expression: str) -> str:
        self.lines.append(f"    {name} = {self._filled(expression)}")
        return name

    def _frozen(self, frozen: Frozen, access: str, name: str) -> None:
        self._check(" and ".join(frozen.conditions(access, self._name)), f"value of {name}")

    def _parameters(self) -> None:
        for place, name in zip(self.captured.parameters, self.parameters.values(), strict=True):
            self._bind(name, functools.reduce(attribute, place.attributes, self._module(place.path)))
            self._check(f"type({name}) is int", f"value of {place}")
        if self.parameters:
            values = "".join(f"{name}, " for name in self.parameters.values())
            reason = f"value of {', '.join(map(str, self.captured.parameters))}"
            self._check(f"({values}) in proven", reason, self.unproven, "True")

    def _filled(self, text: str) -> str:
        for place, name in self.parameters.items():
            text = text.replace(place, name)
        return text

    # -- arguments

    def _inputs(self) -> None:
        for index, given in enumerate(self.captured.inputs):
            x = self._bind(f"x{index}", given.access)
            if isinstance(given, TensorInput):
                self._tensor(index, given)
            elif isinstance(given, NumberInput):
                self._check(f"type({x}) is int", f"type of {given.name}")
                self._bind(size_name(index, 0), x)

    def _tensor(self, index: int, given: TensorInput) -> None:
        x = f"x{index}"
        self._check(f"type({x}) in Plain", f"{given.name} is not a plain tensor")
        if given.dtype is None:
            return
        self._check(f"{x}.dtype is {self._name(given.dtype)}", f"dtype of {given.name}")
        self._check(f"{x}.device == {self._name(given.device)}", f"device of {given.name}")
        self._check(f"{x}.dim() == {len(given.shape)}", f"number of dimensions of {given.name}")
        if given.shape:
            self._bind(f"{', '.join(size_name(index, dim) for dim in range(len(given.shape)))},", f"{x}.shape")
        if self.captured.dependencies.asks_requires_grad:
            self._check(f"{x}.requires_grad is {given.requires_grad}", f"requires_grad of {given.name}")
        if self.captured.dependencies.asks_layout:
            self._check(f"{x}.is_contiguous() is {given.contiguous}", f"memory layout of {given.name}")

    def _identities(self) -> None:
        for one, other in self.captured.same:
            self._check(f"{one} is {other}", "one tensor was given twice")
        ids = [f"id(x{i})" for i, given in enumerate(self.captured.inputs) if not isinstance(given, NumberInput)]
        if len(ids) > 1:
            self._check(f"len({{{', '.join(ids)}}}) == {len(ids)}", "different tensors were given, now one twice")

    def _readable(self, clause: str) -> str:
        def name(match: re.Match[str]) -> str:
            given = self.captured.inputs[int(match[1])]
            return given.name if isinstance(given, NumberInput) else f"{given.name}.shape[{match[2]}]"

        return re.sub(r"\bs(\d+)_(\d+)\b", name, clause)

    def _constant(self, leaf: Leaf) -> None:
        if is_constant(leaf.value):
            self._frozen(self.freezer.freeze(leaf.value), leaf.access, leaf.name)
        else:
            self._check(f"{leaf.access} is {self._name(leaf.value)}", f"{leaf.name} is another object")

    def _name(self, value: object) -> str:
        if isinstance(value, Inside):
            return "self" + "".join(f"._modules[{name!r}]" for name in filter(None, value.path.split(".")))
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    # -- ambient state

    def _ambient(self) -> None:
        around = self.captured.ambient
        if around is None:
            return
        if self.captured.dependencies.asks_grad_mode:
            self._check(f"torch.is_grad_enabled() is {around.grad}", "grad mode")
        for kind, enabled, dtype in around.autocast:
            self._check(f"torch.is_autocast_enabled({kind!r}) is {enabled}", f"autocast on {kind}")
            if enabled:
                expression = f"torch.get_autocast_dtype({kind!r}) is {self._name(dtype)}"
                self._check(expression, f"autocast dtype on {kind}")

    # -- the module

    def _module(self, path: str) -> str:
        """Return the name of the submodule at the path, bound when it is first asked for."""
        if path not in self.module_names:
            parent, last = self._parent(path)
            self.module_names[path] = self._bind(f"m{len(self.module_names)}", f"{parent}._modules[{last!r}]")
        return self.module_names[path]

    def _parent(self, path: str) -> tuple[str, str]:
        """Return the name of the module that has what is at the path, and what it is called there."""
        parent, _, last = path.rpartition(".")
        return self._module(parent), last

    def _object(self, place: AttributePath) -> str:
        """Return the name of the object at the place, bound when it is first asked for."""
        if not place.attributes:
            return self._module(place.path)
        if place not in self.object_names:
            access = attribute(self._owner(place), place.attributes[-1])
            self.object_names[place] = self._bind(f"o{len(self.object_names)}", access)
        return self.object_names[place]

    def _owner(self, place: AttributePath) -> str:
        """Return the name of the object that has the attribute."""
        return self._object(AttributePath(place.path, place.attributes[:-1]))

    def _modules(self) -> None:
        for table in global_hook_tables():
            self._check(f"not {self._name(table)}", "a global module hook")
        for path, kind in sorted(self.classes.items()):
            m = self._module(path)
            self._check(f"type({m}) is {self._name(kind)}", f"class of {path}")
            self._check(f"not ({_any_hook(m)})", f"a hook on {path}")
            self._check(f"'forward' not in {m}.__dict__", f"forward of {path} is replaced")
            for name in self.unset.get(path, ()):
                self._check(f"{m}.{name} is None", f"{name} of {path} is set")

    def _structure(self) -> None:
        """Check what is where in the tree of modules."""
        for path, names in self.captured.dependencies.children.items():
            self._check(f"(*{self._module(path)}._modules,) == {names!r}", f"children of {path}")
        for place, known in self.captured.dependencies.aliases.items():
            owner = self._module(place.path)
            parent, last = self._parent(known)
            other = f"getattr({parent}, {last!r})" if last else "self"
            same = f"getattr({owner}, {place.attributes[0]!r}) is {other}"
            self._check(same, f"{place} is no longer {known or 'the module itself'}")

    def _reads(self) -> None:
        relied = self.captured.dependencies
        for place, frozen in relied.held.items():
            self._compared(place, frozen)
        for place, value in relied.read.items():
            self._compared(place, self.freezer.freeze(value))
        for place in relied.absent:
            self._check(f"not hasattr({self._owner(place)}, {place.attributes[-1]!r})", f"{place} now exists")
        for place in relied.methods:
            self._check(f"{place.attributes[-1]!r} not in {self._owner(place)}.__dict__", f"{place} is replaced")
        for name, facts in self.captured.owned.items():
            self._owned(name, *facts)
        for name, flag in relied.flags.items():
            parent, last = self._parent(name)
            self._check(f"{attribute(parent, last)}.requires_grad is {flag}", f"requires_grad of {name}")

    def _compared(self, place: AttributePath, frozen: Frozen) -> None:
        # what is read of an object is compared where it is read: it needs a name
        is_object = isinstance(frozen, OfType)
        access = self._object(place) if is_object else attribute(self._owner(place), place.attributes[-1])
        self._frozen(frozen, access, str(place))

    def _owned(self, name: str, table: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        parent, last = self._parent(name)
        t = self._bind("t", f"{parent}.{table}.get({last!r})")
        self._check(f"{t} is not None", f"{name} is gone")
        same = f"t.dtype is {self._name(dtype)} and t.device == {self._name(device)} and t.shape == {self._name(shape)}"
        self._check(same, f"dtype, device or shape of {name}")


def _any_hook(m: str) -> str:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return " or ".join(f"{m}.{table}" for table in tables)
