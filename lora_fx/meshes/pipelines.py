"""What each stage of a pipeline takes, seen as the whole model runs: as many blocks each, one after another.

What is made from the first block of a stage on, until the first of the next, is made by that stage; in the backward
pass it is the turn of a stage when what it sent gets its gradient.  What is used before the first block is the first
stage's, what is used behind the last block the last's, and what both use (a tied embedding) both have.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_fx.capture.calls.objects import tensors_in
from lora_fx.errors import RefusedError
from lora_fx.meshes.onedevice import OneDevice
from lora_fx.planning.budget import StepCost
from lora_fx.text import count


@dataclass(slots=True)
class OneStage:
    """What one stage makes of one micro-batch."""

    before: int = 0
    """Bytes that are live and not its own, while it is its turn."""
    own: int = 0
    """Bytes of what it made that live between the two passes."""
    peak: int = 0
    """Most bytes at once of what it made."""
    again: int = 0
    """Bytes that the first stage made and each makes for itself (masks, positions)."""
    received: int = 0
    """Bytes that the stage before sends, and gets a gradient for."""
    flops: int = 0


@dataclass(slots=True)
class Pipeline:
    """The stages of a model of which one step is counted."""

    paths: list[list[str]]
    """The blocks of each stage."""
    stages: list[OneStage]
    used: dict[int, set[int]] = field(default_factory=dict)
    """The stages whose forward passes use a storage, by its number."""
    _made: dict[int, int] = field(default_factory=dict)
    """The stage that made a storage, by its number."""
    _held: list[Any] = field(default_factory=list)
    """What stages send, and the output, which they hold until their backward pass."""
    _called: list[str] = field(default_factory=list)
    _passing: list[str] = field(default_factory=list)
    """Blocks that are given more than the one before has made."""
    _now: int = 0
    _flops: int = 0
    _forward: bool = True

    def followed(self, model: nn.Module, device: OneDevice) -> list[Any]:
        """Let a device tell what it makes as the model runs; return the handles of the hooks."""
        device.seen = self._see
        handles: list[Any] = []
        for number, paths in enumerate(self.paths):
            first, last = model.get_submodule(paths[0]), model.get_submodule(paths[-1])
            for path in paths:
                handles.append(model.get_submodule(path).register_forward_pre_hook(self._calling(path)))
            if number:
                handles.append(first.register_forward_pre_hook(self._beginning(number, device), with_kwargs=True))
            if number + 1 < len(self.paths):
                handles.append(last.register_forward_hook(self._sending))
        return handles

    def between_passes(self, device: OneDevice, output: object) -> None:
        """Note that the forward pass has ended, and what came of it."""
        self._forward = False
        for key, size in device.sizes():
            self.stages[self._made.get(key, 0)].own += size
        self._held = [output]
        before = 0
        for stage in self.stages:
            stage.before = before
            before += stage.own
            stage.own += stage.again

    def check(self) -> None:
        """Raise RefusedError where the blocks did not run once, one after the other, on what the one before made."""
        wanted = [path for paths in self.paths for path in paths]
        if self._called != wanted:
            pairs = zip((*self._called, "(end)"), (*wanted, "(end)"), strict=False)
            facts = [(path, f"runs where {other} is next") for path, other in pairs if path != other][:1]
            raise RefusedError("this model is no pipeline: its blocks do not run once, one after the other", facts)
        if self._passing:
            facts = [(path, "is given what the block before has not made") for path in dict.fromkeys(self._passing)]
            raise RefusedError(
                "this model is no pipeline: gradients pass between its blocks in another way",
                facts,
                "a stage may train the stage before through its results alone; a KV cache needs use_cache=False",
            )

    def costs(self, device: OneDevice, micro_batches: int) -> list[StepCost]:
        """Return what a step of 1F1B takes on each stage, which keeps min(stages - i, m) micro-batches between passes.

        torch.distributed.pipelining has a buffer for what each micro-batch receives, and for each gradient of what is
        sent, all the time.
        """
        self._turn(0, device)
        found = []
        for number, stage in enumerate(self.stages):
            following = self.stages[number + 1] if number + 1 < len(self.stages) else OneStage()
            buffers = micro_batches * (stage.received + following.received)
            flying = min(len(self.stages) - number, micro_batches)
            peak = (flying - 1) * stage.own + stage.peak + buffers
            found.append(StepCost(flying * stage.own + buffers, peak, peak, micro_batches * stage.flops))
        return found

    def has(self, number: int, name: str, tensor: Tensor) -> bool:
        """Whether a stage has a parameter or buffer: of its blocks, or used by it; what nobody uses the first has."""
        inside = {at for at, paths in enumerate(self.paths) if any(name.startswith(f"{path}.") for path in paths)}
        return number in (inside | self.used.get(tensor.untyped_storage()._cdata, set()) or {0})

    def _see(self, device: OneDevice, given: Iterable[Tensor], made: Iterable[Tensor]) -> None:
        stage = self.stages[self._now]
        stage.peak = max(stage.peak, device.live - stage.before + stage.again)
        if self._forward:
            for tensor in given:
                self.used.setdefault(tensor.untyped_storage()._cdata, set()).add(self._now)
            known = {tensor.untyped_storage()._cdata for tensor in given}
            for key in (tensor.untyped_storage()._cdata for tensor in made):
                if key not in known:
                    self._made[key] = self._now

    def _turn(self, number: int, device: OneDevice) -> None:
        """Let it be the turn of a stage from now on."""
        self.stages[self._now].flops += device.flops - self._flops
        self._now, self._flops = number, device.flops
        if not self._forward:
            self._held.clear()

    def _calling(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._forward:  # and not where a block that checkpoints itself runs again
                self._called.append(path)

        return hook

    def _beginning(self, number: int, device: OneDevice) -> Callable[..., None]:
        def back(_gradient: Tensor) -> None:
            self._turn(number - 1, device)

        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._forward:
                return
            self._turn(number, device)
            stage, sent = (
                self.stages[number],
                {tensor.untyped_storage()._cdata for tensor in tensors_in(self._held[-1:])},
            )
            stage.before = device.live
            given = {tensor.untyped_storage()._cdata: tensor for tensor in tensors_in((args, kwargs))}
            stage.received = sum(device.bytes_of(tensor) for key, tensor in given.items() if key in sent)
            stage.again = sum(device.bytes_of(tensor) for key, tensor in given.items() if key not in sent)
            for key, tensor in given.items():
                if tensor.requires_grad and key in sent:
                    tensor.register_hook(back)  # type: ignore[no-untyped-call]
                elif tensor.requires_grad:
                    self._passing.append(self.paths[number][0])

        return hook

    def _sending(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._held.append(output)


def pipeline_of(blocks: Sequence[str], number: int) -> Pipeline:
    """Return a pipeline of so many stages with as many blocks each.

    Raises:
        RefusedError: the blocks do not divide.
    """
    each, left = divmod(len(blocks), number)
    if left or not each:
        facts = [("blocks", f"{count(len(blocks), 'repeated block')} for pp={number}")]
        raise RefusedError("the blocks do not divide into equal stages", facts, "take another size of pp")
    paths = [list(blocks[at * each : (at + 1) * each]) for at in range(number)]
    return Pipeline(paths, [OneStage() for _ in paths])
