"""What `fully_shard` has whole at each time of a step: each block while it runs, what is in no block all the time.

In the backward pass the block before is gathered while a block is computed, and gradients are whole until they are
reduced.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from lora_fx.capture.calls.objects import tensors_in
from lora_fx.meshes.onedevice import OneDevice


@dataclass(frozen=True, slots=True)
class Groups:
    """The bytes of shard groups, when they are whole."""

    rest: int
    """Of what is in no block, with its gradients."""
    forward: dict[str, int]
    """What is gathered beside while a block runs, by its path."""
    backward: dict[str, int]

    @property
    def most(self) -> int:
        """The most bytes that are whole at once."""
        return self.rest + max((*self.forward.values(), *self.backward.values()), default=0)

    def followed(self, model: nn.Module, device: OneDevice) -> list[Any]:
        """Let a device count what is gathered as the model runs; return the handles of the hooks that tell."""
        device.gathered = self.rest
        handles: list[Any] = []
        for path, size in self.forward.items():
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(_holding(device, self.rest + size)))
            handles.append(block.register_forward_hook(_holding(device, self.rest)))
            handles.append(block.register_forward_hook(_holding_in_backward(device, self.rest + self.backward[path])))
        return handles


NOTHING = Groups(0, {}, {})


def groups_of(model: nn.Module, blocks: Sequence[str], size: Callable[[Tensor], int]) -> Groups:
    """Return the groups of blocks and of the rest; `size` tells the bytes of a parameter that is whole."""
    inside = {path: list(model.get_submodule(path).parameters()) for path in blocks}
    owned = {id(parameter) for group in inside.values() for parameter in group}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in owned]
    sizes = {path: sum(map(size, group)) for path, group in inside.items()}
    before = {path: sizes[first] for first, path in pairwise(blocks)}
    backward = {path: sizes[path] + before.get(path, 0) + _trained(group, size) for path, group in inside.items()}
    return Groups(sum(map(size, rest)) + _trained(rest, size), sizes, backward)


def _trained(group: Sequence[Tensor], size: Callable[[Tensor], int]) -> int:
    return sum(size(parameter) for parameter in group if parameter.requires_grad)


def _holding(device: OneDevice, size: int) -> Callable[..., None]:
    """Return a hook by which so many bytes are whole from now on."""

    def hook(*_: Any) -> None:
        device.gathered = size

    return hook


def _holding_in_backward(device: OneDevice, size: int) -> Callable[..., None]:
    """Return a hook for a block by which so many bytes are whole from when its results get a gradient."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(_holding(device, size))  # type: ignore[no-untyped-call]

    return hook
