"""How a tracer notes what the copy of a module reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_fx.capture.reads.dependencies import Log, Place
from lora_fx.capture.reads.frozen import Freezer, OfType, Unfreezable
from lora_fx.capture.reasons import Untraceable
from lora_fx.capture.tracing.copies import path_of, reports


class Notes:
    """Mixin of the tracers: writes into the log what is read from the module, as it is on the original."""

    log: Log
    original: nn.Module
    owned: dict[int, str]
    """Path of each parameter and buffer of the copy by its identity."""

    def refuse(self, reason: str) -> None:
        raise Untraceable(reason)

    def read(self, place: Place, value: Any) -> None:
        self.log.read.setdefault(place, list(value) if isinstance(value, list) else value)

    def method(self, place: Place) -> None:
        self.log.methods[place] = None

    def child(self, place: Place, value: Any) -> None:
        known = path_of(value) if isinstance(value, nn.Module) else self.owned.get(id(value), str(place))
        if known != str(place):
            self.log.aliases[place] = known

    def children(self, path: str, children: dict[str, Any]) -> None:
        self.log.children.setdefault(path, tuple(children))
        for name, child in children.items():
            if child is not None:
                self.child(Place(path, (name,)), child)

    def absent(self, place: Place) -> None:
        self.log.absent[place] = None

    def held(self, place: Place, value: Any) -> None:
        if place in self.log.held:
            return
        original = self._original(place)
        if reports(value):
            self.log.held[place] = OfType(type(original))
            return
        paths = {id(each): path for path, each in self.original.named_modules()}
        try:
            self.log.held[place] = Freezer(paths).freeze(value if isinstance(value, Tensor) else original)
        except Unfreezable as found:
            self.refuse(f"the forward reads {place}, {found}")

    def _original(self, place: Place) -> Any:
        value: Any = self.original.get_submodule(place.path)
        for name in place.attributes:
            value = vars(value)[name] if name in vars(value) else getattr(value, name)
        return value
