"""A block of whose layers each process computes a part (tensor parallelism), run as a graph of that part.

What is captured is what one process computes: the block on the parts of the weights that it has, without the hooks that
send.  A graph of it sends around the split layers itself, in the order of their calls.  So all processes must run the
graph, or all the forward.  What one of them learns counts when all have learned the same; nothing is compared by
sending.  And before each call they tell each other in one number what each can do: a hook, or another attribute, that
one of them alone has lets all run the forward.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.attach import attached_to, shown_parameters
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.adapters.fused.eligible import is_watched
from lora_fx.adapters.layers import AdaptedLayer
from lora_fx.adapters.trained import TRAINED
from lora_fx.capture.calls.ambient import RandomState
from lora_fx.capture.calls.reasons import reason_of
from lora_fx.capture.captured import NotCaptured
from lora_fx.liveness.rows import LazyRows, whole
from lora_fx.models.keptparts import KeptParts
from lora_fx.models.layers import linear_layout
from lora_fx.models.parts import LayerPart, all_same, has_style, is_split_so, on_parts_of, part_of_layer
from lora_fx.models.quantised import is_quantised
from lora_fx.models.shards import is_sharded
from lora_fx.models.torch_internals import checkpointing, in_backward, pytree
from lora_fx.models.walking import named_modules_of
from lora_fx.regions.blocks import BlockPrograms
from lora_fx.regions.candidates import structure_of
from lora_fx.regions.checking import REGION, ModuleCall, Replay
from lora_fx.regions.learning import capture_new, prove_waiting
from lora_fx.regions.program import CALLS, COMPILE, LIVENESS, LOSS, Program

OTHERS = "another process that shares its layers cannot do so"
OTHERWISE = "otherwise than a linear by ColwiseParallel() or RowwiseParallel()"
CHANGED = "its layers are not split as they were"
_APART = {COMPILE, LIVENESS, LOSS}
"""Optimisations that split blocks do without: what they do depends on values, or on what only one process knows."""
GONE, NEVER, FORWARD, LEARN, PROGRAMS = range(5)
"""What a process can do with a call, as a number; from the last on it is that of a program.

The layers are not split as they were; no graph can be of them as they are; none can be of this call.
"""
RESTS = 64
"""Calls of a block of which no process can run a graph, before they tell each other again."""
_Find = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[Program, tuple[Any, ...]] | None]
_FACTORS = (LoRAFactor, MovedA, MovedB)


@dataclass(slots=True)
class SplitBlock:
    """How the layers of a block are split."""

    parts: Mapping[str, LayerPart]
    """By the paths of the layers."""
    mesh: Any
    before: BlockPrograms
    """Of the block as long as none of its layers is split."""
    programs: BlockPrograms
    why: str = ""
    """Why this process can run no graph of it."""
    silent: int = 0
    """For how many more calls nothing is sent, as no process can run a graph and all of them know it."""
    kept: dict[tuple[bool, bool], KeptParts] = field(default_factory=dict)
    """What stands for the block as it is now, with gradients and without."""

    def here(self, module: nn.Module) -> KeptParts | None:
        """Return the block on what this process has of its weights; None if it is not split as it was."""
        if self.why:
            return None
        mode = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        kept = self.kept.get(mode)
        if kept is None or not kept.is_of(module):
            if not self._holds(module):
                return None
            self.kept = {other: one for other, one in self.kept.items() if other != mode and one.is_of(module)}
            kept = self.kept[mode] = KeptParts(module, self.parts, REGION)
        kept.renew()
        return kept

    def _holds(self, module: nn.Module) -> bool:
        try:
            layers = {path: module.get_submodule(path) for path in self.parts}
        except AttributeError:  # one of them is gone
            return False
        return all(
            is_split_so(layer, self.parts[path]) and not _obstacle(layer, _sharded_in(layer))
            for path, layer in layers.items()
        )

    def stays(self, module: nn.Module) -> bool:
        """Whether a block that is split otherwise than it was, or than is known, runs its forward; else all begin anew.

        Collective, once for a call as everything is: what begins anew here alone tells the others then.
        """
        if self.silent:
            self.silent -= 1  # in each process alike: all count the same calls
            return True
        found = split_of(module, self.before)
        if not isinstance(found, SplitBlock) or found.mesh != self.mesh:
            return not self.agrees(GONE)
        if not found.why or found.why != self.why:
            return False
        self.silent = RESTS if self.agrees(NEVER) else 0
        return True

    def alone(self, call: ModuleCall) -> ModuleCall:
        """Return a call of the block on these parts by which a graph is found or compared: nothing of it is sent."""
        args, kwargs = pytree.tree_map_only(LazyRows, whole, (call.args, call.kwargs))
        return ModuleCall(on_parts_of(call.module, self.parts, True), call.forward, args, kwargs)

    def uses_rows(self, module: nn.Module) -> bool:
        """Whether adapters are chosen row by row, which split layers refuse."""
        layers = map(module.get_submodule, self.parts)
        first = next((layer for layer in layers if isinstance(layer, AdaptedLayer)), None)
        return first is not None and first.chosen_rows() is not None

    def standing(
        self, call: ModuleCall, hooked: str | None, find: _Find, may_learn: Callable[[ModuleCall], bool], on: bool
    ) -> tuple[tuple[Program, tuple[Any, ...]] | None, int, str | None]:
        """Return what fits a call on these parts, what this process can do with it, and why it can do nothing.

        The reason is empty if it is to be looked for, and None if there is nothing to be said.
        """
        if not on or is_watched() or self.uses_rows(call.module):
            return None, FORWARD, None
        if hooked is not None:
            return None, FORWARD, f"there is a hook on {hooked}, which processes share"
        hit = find(call.module, call.args, call.kwargs)
        if hit is not None:
            numbers = [number for number, one in enumerate(self.programs.programs, 1) if one is hit[0]]
            at = numbers[0] if numbers else 0  # one in the place of which there is another, for more blocks
            return hit, PROGRAMS + 2 * at + hit[0].wants_proof, ""
        # what torch's checkpoint makes again must be made as before, by the forward
        learns = not (in_backward() and checkpointing()) and may_learn(call)
        return None, LEARN if learns else FORWARD, ""

    def agrees(self, number: int) -> bool:
        """Return whether all processes can do the same with a call.  Collective."""
        return all_same(self.mesh, number)

    def learn(self, replay: Replay | None) -> str | None:
        """Capture or prove a program for a call of the block on this process's parts; return why there is none.

        Collective.
        """
        found, why = 0, "the call cannot be made twice"
        if replay is not None:
            before = RandomState(replay.ambient.devices)
            try:
                found = self._found(replay)
            except NotCaptured as reason:
                why = str(reason)
            except Exception as error:  # an error of ours is a reason to run without a graph, not the user's
                why = f"the capture failed: {reason_of(error)}"
            finally:
                before.restore()
        if all_same(self.mesh, found) and found:
            return None
        for program in self.programs.programs:  # what one process has proven beyond the others would part them later
            program.give_up()
        self.programs.programs.clear()
        return OTHERS if found else why

    def _found(self, replay: Replay) -> int:
        """Return what tells whether processes that found a program have come to it in the same way."""
        result = replay.answered_alone()
        waiting = prove_waiting(self.programs, replay, result)
        program = waiting or capture_new(self.programs, replay, result)
        if program.may_give_up:
            raise NotCaptured(CALLS)
        asked = [name for name in program.captured.owned if name.rpartition(".")[0] in self.parts]
        if asked:  # of the whole it would hear another shape
            raise NotCaptured(f"the forward asks about {asked[0]}, of which processes have parts")
        return 1 + 2 * len(self.programs.programs) + (waiting is not None)

    def prove_fast(self, replay: Replay | None, program: Program) -> None:
        """Let a program run its fast code from now on, if all processes find it to be the forward.  Collective."""
        assert program.fast is not None
        difference: str | None = "the call cannot be made twice"
        if replay is not None:
            difference = replay.fast_difference(program.fast, program.guard.match_ones, program.rounds_gradients)
        agreed = all_same(self.mesh, int(difference is None))
        program.decide(difference if difference is not None else None if agreed else OTHERS)


def split_of(module: nn.Module, block: BlockPrograms) -> SplitBlock | str | None:
    """Return how the layers of a block are split; None if none is; else why it runs without a graph.

    Where processes share a layer, it is what they tell each other of before each call, whether or not they can do more.
    """
    inside = named_modules_of(module)
    found = [(path, inner, held) for path, inner in inside if (held := _sharded_in(inner))]
    styled = [(path, inner, held) for path, inner, held in found if has_style(inner)]
    if not styled or any(not path for path, _, _ in found):
        return None  # a layer alone gets DTensors; what else is sharded is FSDP2's
    path, inner, held = styled[0]
    mesh: Any = next(tensor for tensor in _tensors_of(inner) if is_sharded(tensor)).device_mesh
    if mesh.ndim != 1:
        return f"{path} is split {OTHERWISE}"
    parts = _parts_of(inside, found, mesh)
    if isinstance(parts, str):
        return SplitBlock({}, mesh, block, BlockPrograms((), known=False), parts)
    alone = on_parts_of(module, parts, True)
    shared = tuple((path, part.along_outputs, part.mesh) for path, part in parts.items())
    key = (structure_of(alone), shared)
    passes = tuple(name for name in block.passes if name not in _APART)
    return SplitBlock(parts, mesh, block, block.split.setdefault(key, BlockPrograms(passes, known=False)))


def _parts_of(
    inside: list[tuple[str, nn.Module]], found: list[tuple[str, nn.Module, list[str]]], mesh: Any
) -> dict[str, LayerPart] | str:
    """Return how each layer is split; or why a block runs without a graph."""
    parts: dict[str, LayerPart] = {}
    for path, inner, held in found:
        if path.rpartition(".lora_")[0] in parts:
            continue
        part = part_of_layer(inner)
        if part is None:
            return f"{path} is split {OTHERWISE}"
        if why := _obstacle(inner, held):
            return f"{path} is split over processes, and {why}"
        parts[path] = part
    others = [path for path, inner in inside if path and path not in parts and has_style(inner)]
    if others:
        return f"{others[0]} is called {OTHERWISE}"
    if any(part.mesh != mesh for part in parts.values()):
        return "its layers are split over several meshes"
    return parts


def _tensors_of(module: nn.Module) -> list[Any]:
    return [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]


def _sharded_in(module: nn.Module) -> list[str]:
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    return [name for table in tables for name, tensor in table.items() if is_sharded(tensor)]


def _obstacle(layer: nn.Module, held: list[str]) -> str:
    """Return why a split layer is not computed by a graph; empty if it can be."""
    weight, adapters = layer._parameters["weight"], list(attached_to(layer))
    assert weight is not None
    reasons = {
        "it is no plain linear": linear_layout(type(layer)) != "out_in" or bool(shown_parameters(layer)),
        "its weight holds codes": is_quantised(weight),
        "what it holds is trained": TRAINED in vars(layer) or any(_is_trained(layer, name) for name in held),
        "DoRA's lengths are those of whole rows": any(one.spec.lora.dora for one in adapters),
        "its bias is trained": any(one.spec.lora.bias for one in adapters),
        "its factors are of another kind": not all(map(_is_plain, adapters)),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_trained(layer: nn.Module, name: str) -> bool:
    tensor = layer._parameters.get(name)
    return tensor is not None and tensor.requires_grad


def _is_plain(adapter: Any) -> bool:
    factors = (adapter.lora_A, adapter.lora_B)
    return all(type(one) in _FACTORS for one in factors) and adapter.call is None
