"""How a tracer notes what the copy of a module reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.capture.reads.dependencies import AttributePath, Dependencies
from lora_fx.capture.reads.frozen import Freezer, OfType, Unfreezable
from lora_fx.capture.tracing.copies import path_of, reports


class ModuleReads:
    """Mixin of the tracers: writes down what is read from the module, as it is on the original."""

    dependencies: Dependencies
    original: nn.Module
    owned: dict[int, str]
    """Path of each parameter and buffer of the copy by its identity."""

    def refuse(self, reason: str) -> None:
        raise Untraceable(reason)

    def read(self, place: AttributePath, value: Any) -> None:
        self.dependencies.read.setdefault(place, list(value) if isinstance(value, list) else value)

    def method(self, place: AttributePath) -> None:
        self.dependencies.methods[place] = None

    def child(self, place: AttributePath, value: Any) -> None:
        known = path_of(value) if isinstance(value, nn.Module) else self.owned.get(id(value), str(place))
        if known != str(place):
            self.dependencies.aliases[place] = known

    def children(self, path: str, children: dict[str, Any]) -> None:
        self.dependencies.children.setdefault(path, tuple(children))
        for name, child in children.items():
            if child is not None:
                self.child(AttributePath(path, (name,)), child)

    def absent(self, place: AttributePath) -> None:
        self.dependencies.absent[place] = None

    def held(self, place: AttributePath, value: Any) -> None:
        if place in self.dependencies.held:
            return
        original = self._original(place)
        if reports(value):
            self.dependencies.held[place] = OfType(type(original))
            return
        paths = {id(each): path for path, each in self.original.named_modules()}
        try:
            self.dependencies.held[place] = Freezer(paths).freeze(value if isinstance(value, Tensor) else original)
        except Unfreezable as found:
            self.refuse(f"the forward reads {place}, {found}")

    def _original(self, place: AttributePath) -> Any:
        value: Any = self.original.get_submodule(place.path)
        for name in place.attributes:
            value = vars(value)[name] if name in vars(value) else getattr(value, name)
        return value
