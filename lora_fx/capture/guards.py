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

from lora_fx.capture.arguments import Check, Leaf, is_constant
from lora_fx.capture.captured import Captured
from lora_fx.capture.reads.dependencies import Place
from lora_fx.capture.reads.frozen import Freezer, Frozen, Inside, OfType, conditions
from lora_fx.capture.tracing.inputs import NumberInput, TensorInput, size_name
from lora_fx.models.torch_internals import global_hook_tables, shape_guard_names

_AT_LEAST_TWO = re.compile(r"^2 <= (?=s(\d+)_\d+($| and ))")
_FAILURES = "(AttributeError, KeyError, IndexError, TypeError)"


Match = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Any, ...] | int]
"""Returns the graph's inputs, or the index of the reason why this call is none of its own."""


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
    """
    writer = _GuardWriter(captured, classes)
    relaxed = [_relaxed(clause, captured) for clause in captured.size_guards]
    source, reasons = writer.write(list(captured.size_guards), proven=True)
    ones, _ = writer.write(relaxed, proven=True)
    unproven, _ = writer.write(relaxed, proven=False)
    match, match_ones, match_unproven = (_compiled(each, writer.names) for each in (source, ones, unproven))
    return Guard(match, match_ones, match_unproven, tuple(reasons), source, writer.proven)


def _relaxed(clause: str, captured: Captured) -> str:
    found = _AT_LEAST_TWO.match(clause)
    if found is None or isinstance(captured.inputs[int(found[1])], NumberInput):
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
        self.object_names: dict[Place, str] = {}
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
            if isinstance(step, Check):
                lines.append(f"    if not ({self._filled(step.expression)}): return {len(reasons)}")
                reasons.append(step.reason)
            else:
                lines.append(f"    {self._filled(step)}")
        lines += [f"  except {_FAILURES}: return {len(reasons)}", f"  return ({self._inputs()})"]
        reasons.append("structure of the arguments")
        return "\n".join(lines), reasons

    def _parameters(self, proven: bool) -> Iterator[Check | str]:
        for place, name in zip(self.captured.parameters, self.parameters.values(), strict=True):
            yield from self._reach(place.path)
            yield f"{name} = {'.'.join((self.module_names[place.path], *place.attributes))}"
            yield Check(f"type({name}) is int", f"value of {place}")
        if self.parameters:
            values = "".join(f"{name}, " for name in self.parameters.values())
            expression = f"({values}) in proven" if proven else "True"
            yield Check(expression, f"value of {', '.join(map(str, self.captured.parameters))}")

    def _filled(self, text: str) -> str:
        for place, name in self.parameters.items():
            text = text.replace(place, name)
        return text

    def _inputs(self) -> str:
        return "".join(f"x{index}, " for index in range(len(self.captured.inputs)))

    def _steps(self, size_guards: list[str]) -> Iterator[Check | str]:
        yield from self._surroundings()
        yield from self.captured.structure
        for index, each in enumerate(self.captured.inputs):
            yield f"x{index} = {each.access}"
            if isinstance(each, TensorInput):
                yield from self._tensor(index, each)
            elif isinstance(each, NumberInput):
                yield Check(f"type(x{index}) is int", f"type of {each.name}")
                yield f"{size_name(index, 0)} = x{index}"
        yield from self._identities()
        for clause in size_guards:
            yield Check(clause, f"size: {self._readable(clause)}")
        for leaf in self.captured.constants:
            yield self._constant(leaf)
        yield from self._modules()
        yield from self._structure()
        yield from self._reads()
        yield from self._outside()

    # -- arguments

    def _tensor(self, index: int, each: TensorInput) -> Iterator[Check | str]:
        x = f"x{index}"
        yield Check(f"type({x}) in Plain", f"{each.name} is not a plain tensor")
        if each.dtype is None:
            return
        yield Check(f"{x}.dtype is {self._name(each.dtype)}", f"dtype of {each.name}")
        yield Check(f"{x}.device == {self._name(each.device)}", f"device of {each.name}")
        yield Check(f"{x}.dim() == {len(each.shape)}", f"number of dimensions of {each.name}")
        if each.shape:
            yield f"{', '.join(size_name(index, dim) for dim in range(len(each.shape)))}, = {x}.shape"
        if self.captured.log.asks_requires_grad:
            yield Check(f"{x}.requires_grad is {each.requires_grad}", f"requires_grad of {each.name}")
        if self.captured.log.asks_layout:
            yield Check(f"{x}.is_contiguous() is {each.contiguous}", f"memory layout of {each.name}")

    def _identities(self) -> Iterator[Check]:
        for one, other in self.captured.same:
            yield Check(f"{one} is {other}", "one tensor was given twice")
        ids = [f"id(x{i})" for i, each in enumerate(self.captured.inputs) if not isinstance(each, NumberInput)]
        if len(ids) > 1:
            yield Check(f"len({{{', '.join(ids)}}}) == {len(ids)}", "different tensors were given, now one twice")

    def _readable(self, clause: str) -> str:
        def name(match: re.Match[str]) -> str:
            each = self.captured.inputs[int(match[1])]
            return each.name if isinstance(each, NumberInput) else f"{each.name}.shape[{match[2]}]"

        return re.sub(r"\bs(\d+)_(\d+)\b", name, clause)

    def _constant(self, leaf: Leaf) -> Check:
        if not is_constant(leaf.value):
            return Check(f"{leaf.access} is {self._name(leaf.value)}", f"{leaf.name} is another object")
        return Check(conditions(self.freezer.freeze(leaf.value), leaf.access, self._name), f"value of {leaf.name}")

    def _name(self, value: object) -> str:
        if isinstance(value, Inside):
            return "self" + "".join(f"._modules[{each!r}]" for each in filter(None, value.path.split(".")))
        name = f"c{len(self.names)}"
        self.names[name] = value
        return name

    # -- surroundings

    def _surroundings(self) -> Iterator[Check]:
        around = self.captured.surroundings
        if around is None:
            return
        if self.captured.log.asks_grad_mode:
            yield Check(f"torch.is_grad_enabled() is {around.grad}", "grad mode")
        for kind, enabled, dtype in around.autocast:
            yield Check(f"torch.is_autocast_enabled({kind!r}) is {enabled}", f"autocast on {kind}")
            if enabled:
                expression = f"torch.get_autocast_dtype({kind!r}) is {self._name(dtype)}"
                yield Check(expression, f"autocast dtype on {kind}")

    # -- the module

    def _modules(self) -> Iterator[Check | str]:
        for table in global_hook_tables():
            yield Check(f"not {self._name(table)}", "a global module hook")
        for path, kind in sorted(self.classes.items()):
            yield from self._reach(path)
            m = self.module_names[path]
            yield Check(f"type({m}) is {self._name(kind)}", f"class of {path}")
            yield Check(f"not ({_any_hook(m)})", f"a hook on {path}")
            yield Check(f"'forward' not in {m}.__dict__", f"forward of {path} is replaced")

    def _reach(self, path: str) -> Iterator[str]:
        """Bind a name to the submodule at the path."""
        if path in self.module_names:
            return
        parent, _, last = path.rpartition(".")
        yield from self._reach(parent)
        self.module_names[path] = name = f"m{len(self.module_names)}"
        yield f"{name} = {self.module_names[parent]}._modules[{last!r}]"

    def _reads(self) -> Iterator[Check | str]:
        log = self.captured.log
        for place, frozen in log.held.items():
            yield from self._compared(place, frozen)
        for place, value in log.read.items():
            yield from self._compared(place, self.freezer.freeze(value))
        for place in log.absent:
            yield from self._owner(place)
            yield Check(f"not hasattr({self._object(place)}, {place.attributes[-1]!r})", f"{place} now exists")
        for place in log.methods:
            yield from self._owner(place)
            yield Check(f"{place.attributes[-1]!r} not in {self._object(place)}.__dict__", f"{place} is replaced")
        for name, facts in self.captured.owned.items():
            yield from self._owned(name, *facts)
        for name, flag in log.flags.items():
            parent, _, last = name.rpartition(".")
            yield from self._reach(parent)
            yield Check(f"{self.module_names[parent]}.{last}.requires_grad is {flag}", f"requires_grad of {name}")

    def _compared(self, place: Place, frozen: Frozen) -> Iterator[Check | str]:
        yield from self._owner(place)
        access = f"{self._object(place)}.{place.attributes[-1]}"
        if isinstance(frozen, OfType):
            name = self.object_names[place] = f"o{len(self.object_names)}"
            yield f"{name} = {access}"
            access = name
        yield Check(conditions(frozen, access, self._name), f"value of {place}")

    def _owner(self, place: Place) -> Iterator[str]:
        """Bind a name to the object that has the attribute."""
        yield from self._reach(place.path)
        for length in range(1, len(place.attributes)):
            owner = Place(place.path, place.attributes[:length])
            if owner not in self.object_names:
                access = f"{self._object(owner)}.{owner.attributes[-1]}"
                self.object_names[owner] = f"o{len(self.object_names)}"
                yield f"{self.object_names[owner]} = {access}"

    def _object(self, place: Place) -> str:
        """Return the name bound to the object that has the attribute."""
        owner = Place(place.path, place.attributes[:-1])
        return self.object_names[owner] if owner.attributes else self.module_names[place.path]

    def _structure(self) -> Iterator[Check | str]:
        """Check what is where in the tree of modules."""
        for path, names in self.captured.log.children.items():
            yield from self._reach(path)
            yield Check(f"(*{self.module_names[path]}._modules,) == {names!r}", f"children of {path}")
        for place, known in self.captured.log.aliases.items():
            yield from self._reach(place.path)
            parent, _, last = known.rpartition(".")
            yield from self._reach(parent)
            other = f"getattr({self.module_names[parent]}, {last!r})" if last else "self"
            same = f"getattr({self.module_names[place.path]}, {place.attributes[0]!r}) is {other}"
            yield Check(same, f"{place} is no longer {known or 'the module itself'}")

    def _outside(self) -> Iterator[Check]:
        for source, frozen in self.captured.log.outside.items():
            yield Check(
                conditions(frozen, source.access(self._name(source.root)), self._name), f"value of {source.name}"
            )

    def _owned(
        self, name: str, table: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Check | str]:
        parent, _, last = name.rpartition(".")
        yield from self._reach(parent)
        yield f"t = {self.module_names[parent]}.{table}.get({last!r})"
        yield Check("t is not None", f"{name} is gone")
        same = f"t.dtype is {self._name(dtype)} and t.device == {self._name(device)} and t.shape == {self._name(shape)}"
        yield Check(same, f"dtype, device or shape of {name}")


def _any_hook(m: str) -> str:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return " or ".join(f"{m}.{table}" for table in tables)
