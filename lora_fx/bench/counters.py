"""What a step costs that does not depend on the machine: two counts of the same step are equal.

Everything is counted with a dispatch mode and with hooks on saved tensors, which leave the graphs of an adapted model
in use.  torch's FlopCounterMode would not: it puts a hook on all modules, and a graph steps aside for those.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lora_fx.capture.calls.ambient import no_collections
from lora_fx.models.torch_internals import DispatchMode

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Counts:
    """What one step costs."""

    flops: int
    """Floating-point operations of matrix products, convolutions and attention, of both passes."""
    saved_bytes: int
    """What autograd keeps between the passes; weights, adapters and buffers are not counted."""
    peak_bytes: int
    """The most that was live at once of what the step made: activations, temporaries, gradients."""
    aten_calls: int
    """Calls of torch's operators, of both passes."""


def counted(step: Work, forward: Work, own: Iterable[Tensor]) -> Counts:
    """Return the counts of a step, which must have run before: first uses are not the step's.

    Args:
        step: both passes.
        forward: the forward pass alone.
        own: parameters and buffers of the model.
    """
    tally = tallied(step)
    return Counts(tally.flops, saved_bytes(forward, own), tally.peak, tally.calls)


def flops(step: Work) -> int:
    """Return the FLOPs of a step; a multiplication with its addition is two."""
    return tallied(step).flops


def saved_bytes(forward: Work, own: Iterable[Tensor] = ()) -> int:
    """Return the bytes that autograd keeps of a forward pass, every storage once; those of `own` are left out."""
    left_out = {tensor.untyped_storage()._cdata for tensor in own}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in left_out:
            kept[storage._cdata] = tensor, storage.nbytes()  # the tensor keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for _, size in kept.values())


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running, as far as possible: it would take time, and memory."""
    gc.collect()
    with no_collections():
        yield


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Let the garbage collector look only at what is made from now on: with large libraries loaded it is slow."""
    gc.collect()
    # what others have frozen stays frozen; Python 3.12 keeps a few hundred immortal objects there itself
    ours = 10 * gc.get_freeze_count() < len(gc.get_objects())
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def tallied(step: Work) -> "Tally":
    """Return the sums of what a step does; it runs once."""
    tally = Tally()
    with no_collection(), tally:
        step()
    return tally


class Tally(DispatchMode):  # type: ignore[no-untyped-call]
    """Adds up operators, their FLOPs, and the bytes of the storages that are made, less those that go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.calls = 0
        self.peak = 0
        """The most bytes that were live at once of the storages that the step makes."""
        self.live = 0
        """The bytes of those that are live now."""
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operands((*args, *(kwargs or {}).values()))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        result = self.call(func, args, kwargs or {})
        self.calls += 1
        flops = self.computes(func, args, kwargs or {}, result)
        if flops:
            self.flops += self.share(func, given, flops)
        made = operands((result,))
        for tensor in made:
            self._add(tensor, before)
        self.after(func, given, made)
        self.peak = max(self.peak, self.live)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operator does."""
        return func(*args, **kwargs)

    def computes(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the FLOPs of an operator that has just run."""
        return flops_of(func, args, kwargs, result)

    def share(self, func: Any, given: list[Tensor], flops: int) -> int:
        """Return how many of the FLOPs of an operator count."""
        return flops

    def after(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Look at what an operator was given and has made."""

    def size_of(self, tensor: Tensor) -> int:
        """Return the bytes that the storage of a new tensor counts as."""
        return 0 if tensor.device.type == "meta" else tensor.untyped_storage().nbytes()

    def resize(self, key: int, size: int) -> None:
        """Let a storage that is live count as so many bytes from now on."""
        self.live += size - self._known[key]
        self._known[key] = size

    def _add(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in before:
            self._known[key] = size = self.size_of(tensor)
            self.live += size
            weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        """Forget a storage that is no more."""
        self.live -= self._known.pop(key, 0)


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the FLOPs of an operator; 0 for one that multiplies nothing."""
    formula = FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


def operands(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the arguments of an operator, or what it returns, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (list, tuple):
            found += operands(value)
    return found


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Every row meets one matrix; of two matrices, every group of the sum is one product."""
    return 2 * a.shape[0] * a.shape[1] * int(b.shape[-1])


def _matrix_vector(*tensors: Tensor, **_: Any) -> int:
    """The last two are multiplied; what stands before them is added."""
    return 2 * tensors[-2].numel()


_ATEN = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.addmm_: flop_registry[_ATEN.addmm],
    _ATEN.baddbmm_: flop_registry[_ATEN.baddbmm],
    **dict.fromkeys((_ATEN.mv, _ATEN.dot, _ATEN.addmv, _ATEN.addmv_), _matrix_vector),
    _ATEN._grouped_mm: _grouped,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's own formulas, and those for what torch leaves out: products in place, attention on the CPU."""
