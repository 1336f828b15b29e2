"""What submodules returned in one real run: the way to put a submodule that cannot run on fake tensors into a graph.

Such a submodule (a Python loop over the sequence, a kernel without a meta implementation) becomes one call.  Its
result's sizes are those of the real run, written in terms of the sizes of its arguments, and checked at every call.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import CONSTANTS, is_constant
from lora_fx.capture.calls.reasons import Untraceable
from lora_fx.models.torch_internals import hint_of, pytree


class NeedsRecord(BaseException):
    """The submodule at `path` cannot run on fake tensors; what it returned in a real run would do."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path)
        self.path = path
        self.reason = reason


class OtherShape(Exception):
    """A submodule returned a tensor of another shape than the graph was made for; the forward must run instead."""


@dataclass(slots=True)
class Records:
    """Results of the submodules of one module, call by call, as tensors on the meta device."""

    results: dict[str, list[Any]] = field(default_factory=dict)

    def hooked(self, module: nn.Module, work: Callable[[], Any]) -> None:
        """Run `work`, which calls the module's submodules, and keep what they return."""

        def keep(path: str, _module: nn.Module, _args: Any, result: Any) -> None:
            self.results.setdefault(path, []).append(pytree.tree_map_only(Tensor, _stub, result))

        with contextlib.ExitStack() as stack:
            for path, child in module.named_modules():
                if path:
                    stack.enter_context(child.register_forward_hook(functools.partial(keep, path)))
            work()


def _stub(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def fake_result(recorded: Any, arguments: Any) -> Any:
    """Return fakes like the recorded result of a call, with sizes expressed by those of its (fake) arguments.

    To be called under the fake mode.

    Raises:
        Untraceable: what was returned cannot be expressed so.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if not tensors:
        raise Untraceable("a submodule that cannot run on fake tensors is given no tensor")
    device = tensors[0].device

    def fake(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if not leaf.is_contiguous():
                raise Untraceable("a submodule that cannot run on fake tensors returns a tensor that is not contiguous")
            sizes = [_expressed(size, dim, leaf.dim(), tensors) for dim, size in enumerate(leaf.shape)]
            return torch.empty(sizes, dtype=leaf.dtype, device=device)
        if not is_constant(leaf) or isinstance(leaf, CONSTANTS[1:]):
            raise Untraceable(f"a submodule that cannot run on fake tensors returns a {type(leaf).__name__}")
        return leaf

    return pytree.tree_map(fake, recorded)


def _expressed(size: int, dim: int, rank: int, tensors: list[Tensor]) -> Any:
    """Return the symbolic size that this size is an instance of, or the size itself."""
    alike: dict[str, Any] = {}
    for tensor in tensors:
        for position, symbolic in enumerate(tensor.shape):
            if isinstance(symbolic, torch.SymInt) and hint_of(symbolic) == size:
                if position == dim and tensor.dim() == rank:
                    return symbolic
                alike[str(symbolic)] = symbolic
    if len(alike) > 1:
        raise Untraceable("it does not show which of its arguments' sizes is the size of a submodule's result")
    return next(iter(alike.values()), size)


def of_shape(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return the tensor; OtherShape if it does not have these sizes.  Stands in graphs behind a recorded submodule."""
    if tuple(tensor.shape) != tuple(sizes):
        raise OtherShape(f"{tuple(tensor.shape)} instead of {tuple(sizes)}")
    return tensor
