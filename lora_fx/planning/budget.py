"""What a step of training takes on each device of a mesh: printable, serialisable.  Pure data; no torch here."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lora_fx.errors import RefusedError
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text, scaled, wrapped

_AXES = {"dp": "FSDP2 shards over it", "tp": "tensor parallelism"}
_AXIS = re.compile(r"([A-Za-z_]\w*)=([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many devices there are along each axis."""

    dp: int = 1
    """Devices over which `fully_shard` shards; each has inputs of its own."""
    tp: int = 1
    """Devices that share each layer of the plan of tensor parallelism; all have the same inputs."""

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return self.dp * self.tp

    def __str__(self) -> str:
        return f"dp={self.dp}, tp={self.tp}"

    @staticmethod
    def of(axes: "str | Mapping[str, int] | Mesh") -> "Mesh":
        """Return the mesh that a text (`dp=8,tp=4`) or a table of sizes describes.

        Raises:
            RefusedError: an axis of another name or twice, or a size that is no whole number above 0.
        """
        if isinstance(axes, Mesh):
            return axes
        sizes = _read(axes) if isinstance(axes, str) else dict(axes)
        problems = [(name, "is no axis that is counted here") for name in sizes if name not in _AXES]
        problems += [
            (name, f"{size!r} is no whole number above 0")
            for name, size in sizes.items()
            if name in _AXES and (type(size) is not int or size < 1)
        ]
        if problems or not sizes:
            known = ", ".join(f"{name}: {what}" for name, what in _AXES.items())
            raise RefusedError(
                "this mesh cannot be counted", problems or [("mesh", "has no axis")], f"axes are {known}"
            )
        return Mesh(**sizes)


def _read(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = _AXIS.fullmatch(part.strip())
        if found is None or found[1] in sizes:
            why = "is there twice" if found else "is not NAME=SIZE"
            raise RefusedError("this mesh cannot be read", [(part.strip() or "(empty)", why)], "write dp=8,tp=4")
        sizes[found[1]] = int(found[2])
    return sizes


@dataclass(frozen=True, slots=True)
class StepCost:
    """What the two passes of a step take on one device, beside what is there all the time."""

    kept: int
    """Bytes of activations between the two passes."""
    peak: int
    """Most bytes of activations and temporary results at once, of both passes; gradients are not in it."""
    most: int
    """The same with what `fully_shard` has gathered at each time."""
    flops: int
    """Floating point operations of products, convolutions and attention, of both passes."""


@dataclass(frozen=True, slots=True, repr=False)
class Budget(InNotebook):
    """Bytes and FLOPs of a step on the device of a mesh that has the most; `str()` gives a table."""

    schema_version: ClassVar[int] = 1
    model: str
    source: str
    """Name of the rules."""
    mesh: Mesh
    inputs: tuple[str, ...]
    """Of one step of a device, as `int64 [1, 2048]`."""
    dtypes: tuple[str, ...]
    """Of the base's weights."""
    weights: int
    """Bytes of the base's parameters and buffers."""
    adapters: int
    """Bytes of all that is trained, and of what belongs to adapters."""
    optimizer: int
    """Bytes of the optimiser's states."""
    gradients: int
    """Bytes of the gradients of what is trained."""
    gathered: int
    """Most bytes of parameters, and of gradients, that `fully_shard` has whole for a while."""
    plain: StepCost
    checkpointed: StepCost | None
    """With each block checkpointed; None for a model without repeated blocks."""
    blocks: int
    """How many blocks are sharded, and checkpointed, each by itself."""

    def total(self, step: StepCost) -> int:
        """Return the bytes of one device at the peak of a step."""
        return self.weights + self.adapters + self.optimizer + self.gradients + step.most

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return the header and a table of bytes and FLOPs; lines longer than `width` are broken."""
        steps = [step for step in (self.plain, self.checkpointed) if step is not None]
        names = ("", "plain", "checkpointed")

        def row(name: str, *numbers: int, unit: str = "B") -> tuple[str, ...]:
            return name, *(scaled(number, unit) for number in numbers)

        rows = [
            names[: len(steps) + 1],
            *(row(name, *[size] * len(steps)) for name, size in self._lasting().items()),
            row("activations between passes", *(step.kept for step in steps)),
            row("with temporaries, at most", *(step.peak for step in steps)),
            row("all of it, at most", *map(self.total, steps)),
            row("a step computes", *(step.flops for step in steps), unit="FLOP"),
        ]
        whom = f"each of {self.mesh.devices:,} devices ({self.mesh})" if self.mesh.devices > 1 else "one device"
        heading = f"{self.model} · {self.source} · {whom} · {', '.join(self.dtypes)}"
        given = f"  {count(self.blocks, 'block')}; inputs: {', '.join(self.inputs)}"
        return wrapped("\n".join([heading, given, "", columns(rows)]), width)

    def _lasting(self) -> dict[str, int]:
        return {
            "weights of the base": self.weights,
            "adapters": self.adapters,
            "optimiser states": self.optimizer,
            "gradients": self.gradients,
            "gathered, at most": self.gathered,
        }

    def to_json(self) -> str:
        """Return the budget as JSON; sizes are bytes."""

        def step(cost: StepCost | None) -> dict[str, Any] | None:
            return None if cost is None else {**asdict(cost), "total": self.total(cost)}

        document = {
            "schema_version": self.schema_version,
            **asdict(self),
            "devices": self.mesh.devices,
            "plain": step(self.plain),
            "checkpointed": step(self.checkpointed),
        }
        return json_text(document, indent=1)
