"""Where something outside of a module is: how a guard reads it, and how a capture puts it back."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lora_fx.models.code import attribute

Step = tuple[str, Any]
"""("item", key), ("attribute", name), ("call", None), ("has", key) or ("lookup", key)."""

_READ: dict[str, Callable[[Any, Any], Any]] = {
    "item": operator.getitem,
    "attribute": getattr,
    "call": lambda value, _: value(),
    "has": operator.contains,
    "lookup": lambda value, key: value.get(key),
}
_TEXT = {"item": "{}[{!r}]", "call": "{}()", "has": "({1!r} in {0})", "lookup": "{}.get({!r})"}


@dataclass(frozen=True, slots=True, eq=False)
class ValueSource:
    """Where something is: the steps that lead to it from the root."""

    root: Any
    """The globals of a module, a class, a function or a cell."""
    steps: tuple[Step, ...]
    name: str
    """For people: `SCALE`, `scaled.scale`."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "ValueSource":
        return self  # there is only one such root

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ValueSource) and self.root is other.root and self.steps == other.steps

    def __hash__(self) -> int:
        return hash((id(self.root), self.steps))

    def then(self, kind: str, key: Any) -> "ValueSource":
        """Return where one step further leads."""
        return ValueSource(self.root, (*self.steps, (kind, key)), f"{self.name}.{key}")

    def value(self) -> Any:
        """Return what is there now; None if nothing is."""
        value = self.root
        for kind, key in self.steps:
            try:
                value = _READ[kind](value, key)
            except (LookupError, AttributeError, ValueError):
                return None
        return value

    def access(self, root: str) -> str:
        """Return the expression that reads it, where `root` is the root's name."""
        for kind, key in self.steps:
            root = attribute(root, key) if kind == "attribute" else _TEXT[kind].format(root, key)
        return root

    def put_back(self, value: Any) -> None:
        """Let what is there be `value` again."""
        kind, key = self.steps[-1]
        owner = ValueSource(self.root, self.steps[:-1], self.name).value()
        if isinstance(owner, MappingProxyType):  # of a class
            setattr(ValueSource(self.root, self.steps[:-2], self.name).value(), key, value)
        elif kind == "item":
            owner[key] = value
        elif kind == "attribute":
            setattr(owner, key, value)
        elif kind == "has":
            del owner[key]
