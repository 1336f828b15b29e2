"""What a forward relied on, apart from its arguments."""

from dataclasses import dataclass, field
from typing import Any

from lora_fx.capture.reads.frozen import Frozen
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.reads.sources import ValueSource


@dataclass(slots=True)
class Dependencies:
    """What the forward relied on, apart from its arguments."""

    read: dict[AttributePath, Any] = field(default_factory=dict)
    """Constants."""
    held: dict[AttributePath, Frozen] = field(default_factory=dict)
    """Functions, containers and objects."""
    absent: dict[AttributePath, None] = field(default_factory=dict)
    methods: dict[AttributePath, None] = field(default_factory=dict)
    """Methods of the class, which an attribute of the instance would hide."""
    children: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of the children of modules whose children were listed."""
    aliases: dict[AttributePath, str] = field(default_factory=dict)
    """Second places at which a submodule, parameter or buffer is, and the path by which the graph knows it."""
    outside: dict[ValueSource, Frozen] = field(default_factory=dict)
    """Globals, closures, defaults and flags."""
    inlined: list[str] = field(default_factory=list)
    retreats: dict[str, str] = field(default_factory=dict)
    """Submodules that stay one opaque call, and why."""
    owned: set[str] = field(default_factory=set)
    """Parameters, buffers and tensor attributes that were asked for their dtype, device or shape."""
    flags: dict[str, bool] = field(default_factory=dict)
    """requires_grad of the module's own tensors that were asked for it."""
    asks_requires_grad: bool = False
    asks_layout: bool = False
    asks_grad_mode: bool = False
    """Whether the forward asks for grad mode or changes it; a graph of another serves both modes."""
