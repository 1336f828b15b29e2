"""What of a call decides on whether a graph can be captured of it, and on what its results look like."""

from typing import Any

from torch import Tensor

from lora_fx.capture.calls.ambient import ambient_state
from lora_fx.capture.calls.arguments import flatten, is_constant
from lora_fx.models.torch_internals import FakeTensor
from lora_fx.regions.checking import ModuleCall


def signature_of(call: ModuleCall, sizes: bool = False) -> tuple[object, ...]:
    """Return what calls have in common that all can or all cannot be captured; sizes other than 1 count if asked.

    What fails at a size of 1 may be captured at others.
    """
    flat = flatten(call.args, call.kwargs)
    devices, shapes = set(), []
    for leaf in flat.leaves:
        if isinstance(leaf.value, Tensor):
            shape = leaf.value.shape
            devices.add(leaf.value.device)
            shapes.append(shape if sizes else tuple([size == 1 for size in shape]))
    return (flat.shape_free(), tuple(shapes), call.module.training, ambient_state(devices))


def on_meta(inputs: tuple[Any, ...]) -> bool:
    for value in inputs:  # noqa: SIM110 - a generator would be called again for each of them, in every call of a block
        if isinstance(value, Tensor) and value.is_meta:
            return True
    return False


def sends(inputs: tuple[Any, ...]) -> bool:
    """Whether processes send what they compute of inputs: nothing of fakes, nor on the meta device."""
    return not any(isinstance(value, Tensor) and (value.is_meta or type(value) is FakeTensor) for value in inputs)


def facts_of(inputs: tuple[Any, ...]) -> list[object]:
    """Return what of a program's inputs decides on the shapes, dtypes and gradients of its results."""
    facts: list[object] = []
    for value in inputs:
        if isinstance(value, Tensor):
            facts.append((value.shape, value.dtype, value.requires_grad))
        else:
            facts.append(value if is_constant(value) else type(value))
    return facts
