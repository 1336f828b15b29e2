"""A change of a model in place is whole or none: whatever ends it in the middle, what was there comes back."""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.models.together import are_alike, copied_together, is_dense, share_memory
from lora_fx.models.torch_internals import deepcopy

_TABLES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
"""Of a module's attributes: its children, tensors and hooks."""
Held = tuple[object, Sequence[str]]
"""An object that is none of the modules, and the names of its attributes that a change may replace or fill."""


@contextlib.contextmanager
def all_or_nothing(modules: Iterable[nn.Module], held: Iterable[Held] = (), graphs: bool = False) -> Iterator[None]:
    """Return a context: if anything ends it early, a kill aside, modules have the children and attributes from before.

    Values of tensors are not kept; `write_together` is for those.  Nor is what modules hold besides, as lists.

    Args:
        modules: those of a model that are changed in place in the context, or may be.
        held: other objects that change with it.
        graphs: whether the graphs of GraphModules change too.  Those that come back are copies.
    """
    before = [_Before(module, graphs) for module in modules]
    objects = [(one, {name: (value, _contents(value)) for name, value in _named(one, names)}) for one, names in held]
    try:
        yield
    except BaseException:
        for module in before:
            module.restore()
        for one, values in objects:
            for name, (value, contents) in values.items():
                _refill(value, contents)
                setattr(one, name, value)
        raise


def _named(one: object, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    yield from ((name, getattr(one, name)) for name in names)


class _Before:
    """What a module was."""

    def __init__(self, module: nn.Module, graphs: bool) -> None:
        self._module, self._kind = module, type(module)
        self._attributes = attributes = vars(module).copy()
        self._filled: dict[str, Any] = {}
        for name in _TABLES:  # in one call for each of a model's modules
            if table := attributes.get(name):
                self._filled[name] = table.copy()
        self._graph = deepcopy(module.graph) if graphs and isinstance(module, fx.GraphModule) else None

    def restore(self) -> None:
        """Let it be that again."""
        self._module.__class__ = self._kind
        attributes = vars(self._module)
        for name in attributes.keys() - self._attributes.keys():
            del attributes[name]
        attributes.update(self._attributes)
        for name in _TABLES:
            if (table := self._attributes.get(name)) is not None:
                _refill(table, self._filled.get(name, ()))
        if self._graph is not None:
            assert isinstance(self._module, fx.GraphModule)
            self._module.graph = self._graph


def _contents(table: object) -> Any:
    """Return what a dict, list or set has in it now; None of anything else."""
    return copy.copy(table) if isinstance(table, dict | list | set) else None


def _refill(table: Any, contents: Any) -> None:
    """Let a dict, list or set have these contents again, in their order."""
    if contents is None or (table == contents and [*table] == [*contents]):
        return
    table.clear()
    (table.extend if isinstance(table, list) else table.update)(contents)


def write_together(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write values (second) into tensors (first), in place: all of them, or none where something ends it early."""
    targets, values = [target for target, _ in copies], [value for _, value in copies]
    if are_alike(targets, values) and not share_memory(targets, values):
        copied_together(targets, values)
        return
    with torch.no_grad():
        before = [(target, target.clone()) for target in targets]
        copies = _apart(copies)
        try:
            for target, value in copies:
                target.copy_(value)
        except BaseException:
            for target, value in before:
                target.copy_(value)
            raise


def _apart(copies: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
    """Return the same, with copies of the values where one may lie in the memory of another's target."""
    if not copies:
        return copies
    targets, values = zip(*copies, strict=True)
    plain = all(type(one) in (Tensor, nn.Parameter) and is_dense(one) for one in (*targets, *values))
    if plain and not share_memory(targets, values):
        return copies
    return [(target, value.clone()) for target, value in copies]
