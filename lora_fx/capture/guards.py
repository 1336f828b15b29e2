"""Guards: everything that a captured graph relies on, compiled into one Python function.

The function takes the module, args and kwargs of a call and returns the graph's inputs, or the number of the first
check that failed.  It is plain Python with plain names, so that a hit costs microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import GuardCheck, Leaf, is_constant
from lora_fx.capture.captured import Captured
from lora_fx.capture.reads.dependencies import AttributePath
from lora_fx.capture.reads.frozen import Freezer, Frozen, Inside, OfType, conditions
from lora_fx.capture.tracing.inputs import NumberInput, TensorInput, size_name
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


def compile_guard(captured: Captured, classes: Mapping[str, type]) -> Guard:
    """Return the guard of a captured graph.

    Args:
        captured: the graph and what it relies on.
        classes: for each submodule whose own call the graph bypasses, the class that it must have.

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
    writer = _GuardWriter(captured, classes)
    relaxed = [_relaxed(clause, captured) for clause in captured.size_guards]
    source, reasons = writer.write(list(captured.size_guards), proven=True)
    ones, _ = writer.write(relaxed, proven=True)
    unproven, _ = writer.write(relaxed, proven=False)
    match, match_ones, match_unproven = (_compiled(text, writer.names) for text in (source, ones, unproven))
    return Guard(match, match_ones, match_unproven, tuple(reasons), source, writer.proven)


def _relaxed(clause: str, captured: Captured) -> str:
    size = _AT_LEAST_TWO.match(clause)
    if size is None or isinstance(captured.inputs[int(size[1])], NumberInput):
        return clause
    return _AT_LEAST_TWO.sub(r"1 <= ", clause)


def _compiled(source: str, names: dict[str, Any]) -> Any:
    scope = dict(names)
    exec(compile(source, "<lora_fx guard>", "exec"), scope)
    return scope["guard"]


class _GuardWriter:
    """Writes the source of one guard."""

    def __init__(self, captured: Captured, classes: Mapping[str, type]) -> None:
        self.captured = captured
        self.classes = classes
        self.names: dict[str, Any] = {**shape_guard_names, "Plain": (Tensor, nn.Parameter), "torch": torch}
        self.module_names: dict[str, str] = {}
        self.object_names: dict[AttributePath, str] = {}
        self.freezer = Freezer()
        self.proven: set[tuple[int, ...]] = set()
        self.names["proven"] = self.proven
        self.parameters = {f"«{place}»": f"p{index}" for index, place in enumerate(captured.parameters)}

    def write(self, size_guards: list[str], proven: bool) -> tuple[str, list[str]]:
        """Return (source, reasons); with `proven`, parameters must have values for which the graph was proven."""
        self.module_names = {"": "self"}
        self.object_names = {}
        reasons: list[str] = []
        lines = ["def guard(self, args, kwargs):", "  try:"]
        for step in (*self._parameters(proven), *self._steps(size_guards)):
            if isinstance(step, GuardCheck):
                lines.append(f"    if not ({self._filled(step.expression)}): return {len(reasons)}")
                reasons.append(step.reason)
            else:
                lines.append(f"    {self._filled(step)}")
        lines += [f"  except {_FAILURES}: return {len(reasons)}", f"  return ({self._inputs()})"]
        reasons.append("structure of the arguments")
        return "\n".join(lines), reasons

    def _parameters(self, proven: bool) -> Iterator[GuardCheck | str]:
        for place, name in zip(self.captured.parameters, self.parameters.values(), strict=True):
            yield from self._reach(place.path)
            yield f"{name} = {'.'.join((self.module_names[place.path], *place.attributes))}"
            yield GuardCheck(f"type({name}) is int", f"value of {place}")
        if self.parameters:
            values = "".join(f"{name}, " for name in self.parameters.values())
            expression = f"({values}) in proven" if proven else "True"
            yield GuardCheck(expression, f"value of {', '.join(map(str, self.captured.parameters))}")

    def _filled(self, text: str) -> str:
        for place, name in self.parameters.items():
            text = text.replace(place, name)
        return text

    def _inputs(self) -> str:
        return "".join(f"x{index}, " for index in range(len(self.captured.inputs)))

    def _steps(self, size_guards: list[str]) -> Iterator[GuardCheck | str]:
        yield from self._ambient()
        yield from self.captured.structure
        for index, given in enumerate(self.captured.inputs):
            yield f"x{index} = {given.access}"
            if isinstance(given, TensorInput):
                yield from self._tensor(index, given)
            elif isinstance(given, NumberInput):
                yield GuardCheck(f"type(x{index}) is int", f"type of {given.name}")
                yield f"{size_name(index, 0)} = x{index}"
        yield from self._identities()
        for clause in size_guards:
            yield GuardCheck(clause, f"size: {self._readable(clause)}")
        for leaf in self.captured.constants:
            yield self._constant(leaf)
        yield from self._modules()
        yield from self._structure()
        yield from self._reads()
        yield from self._outside()

    # -- arguments

    def _tensor(self, index: int, given: TensorInput) -> Iterator[GuardCheck | str]:
        x = f"x{index}"
        yield GuardCheck(f"type({x}) in Plain", f"{given.name} is not a plain tensor")
        if given.dtype is None:
            return
        yield GuardCheck(f"{x}.dtype is {self._name(given.dtype)}", f"dtype of {given.name}")
        yield GuardCheck(f"{x}.device == {self._name(given.device)}", f"device of {given.name}")
        yield GuardCheck(f"{x}.dim() == {len(given.shape)}", f"number of dimensions of {given.name}")
        if given.shape:
            yield f"{', '.join(size_name(index, dim) for dim in range(len(given.shape)))}, = {x}.shape"
        if self.captured.dependencies.asks_requires_grad:
            yield GuardCheck(f"{x}.requires_grad is {given.requires_grad}", f"requires_grad of {given.name}")
        if self.captured.dependencies.asks_layout:
            yield GuardCheck(f"{x}.is_contiguous() is {given.contiguous}", f"memory layout of {given.name}")

    def _identities(self) -> Iterator[GuardCheck]:
        for one, other in self.captured.same:
            yield GuardCheck(f"{one} is {other}", "one tensor was given twice")
        ids = [f"id(x{i})" for i, given in enumerate(self.captured.inputs) if not isinstance(given, NumberInput)]
        if len(ids) > 1:
            yield GuardCheck(f"len({{{', '.join(ids)}}}) == {len(ids)}", "different tensors were given, now one twice")

    def _readable(self, clause: str) -> str:
        def name(match: re.Match[str]) -> str:
            given = self.captured.inputs[int(match[1])]
            return given.name if isinstance(given, NumberInput) else f"{given.name}.shape[{match[2]}]"

        return re.sub(r"\bs(\d+)_(\d+)\b", name, clause)

    def _constant(self, leaf: Leaf) -> GuardCheck:
        if not is_constant(leaf.value):
            return GuardCheck(f"{leaf.access} is {self._name(leaf.value)}", f"{leaf.name} is another object")
        return GuardCheck(conditions(self.freezer.freeze(leaf.value), leaf.access, self._name), f"value of {leaf.name}")

    def _name(self, value: object) -> str:
        if isinstance(value, Inside):
            return "self" + "".join(f"._modules[{name!r}]" for name in filter(None, value.path.split(".")))
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    # -- ambient state

    def _ambient(self) -> Iterator[GuardCheck]:
        around = self.captured.ambient
        if around is None:
            return
        if self.captured.dependencies.asks_grad_mode:
            yield GuardCheck(f"torch.is_grad_enabled() is {around.grad}", "grad mode")
        for kind, enabled, dtype in around.autocast:
            yield GuardCheck(f"torch.is_autocast_enabled({kind!r}) is {enabled}", f"autocast on {kind}")
            if enabled:
                expression = f"torch.get_autocast_dtype({kind!r}) is {self._name(dtype)}"
                yield GuardCheck(expression, f"autocast dtype on {kind}")

    # -- the module

    def _modules(self) -> Iterator[GuardCheck | str]:
        for table in global_hook_tables():
            yield GuardCheck(f"not {self._name(table)}", "a global module hook")
        for path, kind in sorted(self.classes.items()):
            yield from self._reach(path)
            m = self.module_names[path]
            yield GuardCheck(f"type({m}) is {self._name(kind)}", f"class of {path}")
            yield GuardCheck(f"not ({_any_hook(m)})", f"a hook on {path}")
            yield GuardCheck(f"'forward' not in {m}.__dict__", f"forward of {path} is replaced")

    def _reach(self, path: str) -> Iterator[str]:
        """Bind a name to the submodule at the path."""
        if path in self.module_names:
            return
        parent, _, last = path.rpartition(".")
        yield from self._reach(parent)
        self.module_names[path] = name = f"m{len(self.module_names)}"
        yield f"{name} = {self.module_names[parent]}._modules[{last!r}]"

    def _reads(self) -> Iterator[GuardCheck | str]:
        relied = self.captured.dependencies
        for place, frozen in relied.held.items():
            yield from self._compared(place, frozen)
        for place, value in relied.read.items():
            yield from self._compared(place, self.freezer.freeze(value))
        for place in relied.absent:
            yield from self._owner(place)
            yield GuardCheck(f"not hasattr({self._object(place)}, {place.attributes[-1]!r})", f"{place} now exists")
        for place in relied.methods:
            yield from self._owner(place)
            yield GuardCheck(f"{place.attributes[-1]!r} not in {self._object(place)}.__dict__", f"{place} is replaced")
        for name, facts in self.captured.owned.items():
            yield from self._owned(name, *facts)
        for name, flag in relied.flags.items():
            parent, _, last = name.rpartition(".")
            yield from self._reach(parent)
            yield GuardCheck(f"{self.module_names[parent]}.{last}.requires_grad is {flag}", f"requires_grad of {name}")

    def _compared(self, place: AttributePath, frozen: Frozen) -> Iterator[GuardCheck | str]:
        yield from self._owner(place)
        access = f"{self._object(place)}.{place.attributes[-1]}"
        if isinstance(frozen, OfType):
            name = self.object_names[place] = f"o{len(self.object_names)}"
            yield f"{name} = {access}"
            access = name
        yield GuardCheck(conditions(frozen, access, self._name), f"value of {place}")

    def _owner(self, place: AttributePath) -> Iterator[str]:
        """Bind a name to the object that has the attribute."""
        yield from self._reach(place.path)
        for length in range(1, len(place.attributes)):
            owner = AttributePath(place.path, place.attributes[:length])
            if owner not in self.object_names:
                access = f"{self._object(owner)}.{owner.attributes[-1]}"
                self.object_names[owner] = f"o{len(self.object_names)}"
                yield f"{self.object_names[owner]} = {access}"

    def _object(self, place: AttributePath) -> str:
        """Return the name bound to the object that has the attribute."""
        owner = AttributePath(place.path, place.attributes[:-1])
        return self.object_names[owner] if owner.attributes else self.module_names[place.path]

    def _structure(self) -> Iterator[GuardCheck | str]:
        """Check what is where in the tree of modules."""
        for path, names in self.captured.dependencies.children.items():
            yield from self._reach(path)
            yield GuardCheck(f"(*{self.module_names[path]}._modules,) == {names!r}", f"children of {path}")
        for place, known in self.captured.dependencies.aliases.items():
            yield from self._reach(place.path)
            parent, _, last = known.rpartition(".")
            yield from self._reach(parent)
            other = f"getattr({self.module_names[parent]}, {last!r})" if last else "self"
            same = f"getattr({self.module_names[place.path]}, {place.attributes[0]!r}) is {other}"
            yield GuardCheck(same, f"{place} is no longer {known or 'the module itself'}")

    def _outside(self) -> Iterator[GuardCheck]:
        for source, frozen in self.captured.dependencies.outside.items():
            yield GuardCheck(
                conditions(frozen, source.access(self._name(source.root)), self._name), f"value of {source.name}"
            )

    def _owned(
        self, name: str, table: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Iterator[GuardCheck | str]:
        parent, _, last = name.rpartition(".")
        yield from self._reach(parent)
        yield f"t = {self.module_names[parent]}.{table}.get({last!r})"
        yield GuardCheck("t is not None", f"{name} is gone")
        same = f"t.dtype is {self._name(dtype)} and t.device == {self._name(device)} and t.shape == {self._name(shape)}"
        yield GuardCheck(same, f"dtype, device or shape of {name}")


def _any_hook(m: str) -> str:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return " or ".join(f"{m}.{table}" for table in tables)
