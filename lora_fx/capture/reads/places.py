"""Where in a module an attribute is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttributePath:
    """An attribute: of the module at `path`, and from there on along `attributes` (`config`, `hidden_act`)."""

    path: str
    attributes: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(filter(None, (self.path, *self.attributes)))
