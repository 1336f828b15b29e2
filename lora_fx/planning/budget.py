"""What a step of training takes on each device of a mesh: printable, serialisable.  Pure data; no torch here."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from lora_fx.errors import RefusedError
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import columns, count, json_text, scaled, wrapped

_AXES = {"dp": "FSDP2 shards over it", "tp": "tensor parallelism", "pp": "stages of a pipeline"}
_AXIS = re.compile(r"([A-Za-z_]\w*)=([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many devices there are along each axis."""

    dp: int = 1
    """Devices over which `fully_shard` shards; each has inputs of its own."""
    tp: int = 1
    """Devices that share each layer of the plan of tensor parallelism; all have the same inputs."""
    pp: int = 1
    """Stages of a pipeline, with as many blocks each; each has all micro-batches."""

    @property
    def devices(self) -> int:
        """How many there are in all."""
        return self.dp * self.tp * self.pp

    def __str__(self) -> str:
        return f"dp={self.dp}, tp={self.tp}" + (f", pp={self.pp}" if self.pp > 1 else "")

    @staticmethod
    def of(axes: "str | Mapping[str, int] | Mesh") -> "Mesh":
        """Return the mesh that a text (`dp=8,tp=4`) or a table of sizes describes.

        Raises:
            RefusedError: an axis of another name or twice, a size that is no whole number above 0, `pp` with `dp`.
        """
        if isinstance(axes, Mesh):
            return axes
        if not isinstance(axes, str | Mapping):
            raise RefusedError("this mesh cannot be read", [("mesh", f"is {axes!r}")], "write dp=8,tp=4")
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
        mesh = Mesh(**sizes)
        if mesh.dp > 1 < mesh.pp:
            facts = [("mesh", str(mesh))]
            raise RefusedError("stages that FSDP2 shards are not counted", facts, "count pp alone, or with tp")
        return mesh


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
    """Bytes of activations between the two passes; of a stage also its buffers for what it receives."""
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
    """How many blocks are sharded, and checkpointed, each by itself; with stages those of this one."""
    micro_batches: int = 1
    """Of a step of a pipeline, in each of which `inputs` are."""
    stages: "tuple[Budget, ...]" = ()
    """Of a pipeline, what each stage takes; the budget itself is that of the stage that takes most."""

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
        if self.stages:
            whom = f"the fullest of {len(self.stages)} stages ({self.mesh}, {self.micro_batches} micro-batches)"
        heading = f"{self.model} · {self.source} · {whom} · {', '.join(self.dtypes)}"
        given = f"  {count(self.blocks, 'block')}; inputs: {', '.join(self.inputs)}"
        lines = [heading, given, "", columns(rows), *self._of_stages()]
        return wrapped("\n".join(lines), width)

    def _of_stages(self) -> list[str]:
        if not self.stages:
            return []
        rows: list[tuple[str, ...]] = [
            ("stage", "blocks", "weights", "adapters", "activations", "all of it", "checkpointed")
        ]
        for number, stage in enumerate(self.stages):
            sizes = [stage.weights, stage.adapters, stage.plain.kept, stage.total(stage.plain)]
            sizes += [stage.total(stage.checkpointed)] if stage.checkpointed else []
            rows.append((str(number), str(stage.blocks), *(scaled(size, "B") for size in sizes)))
        return ["", columns(rows)]

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

        def step(budget: Budget, cost: StepCost | None) -> dict[str, Any] | None:
            return None if cost is None else {**asdict(cost), "total": budget.total(cost)}

        def table(budget: Budget) -> dict[str, Any]:
            steps = {"plain": step(budget, budget.plain), "checkpointed": step(budget, budget.checkpointed)}
            return {**asdict(budget), **steps, "stages": [table(stage) for stage in budget.stages]}

        document = {"schema_version": self.schema_version, **table(self), "devices": self.mesh.devices}
        return json_text(document, indent=1)
