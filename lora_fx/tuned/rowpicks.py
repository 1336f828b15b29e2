"""Which tensors of a run have entries that were picked by values: their places do not say whose rows they are.

What an expert is given are the tokens that a router has chosen.  That it was given all of them, in their order, says
nothing of the next call; so it is seen how its input was made: entries taken out of activations (`index`, `gather`,
`masked_select`, …) at places that depend on the inputs' values.  Packing takes those that are no padding so.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lora_fx.adapters.rawweight.products import name_of
from lora_fx.models.torch_internals import DispatchMode

_FRESH = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
          "new_empty", "new_full", "new_empty_strided")  # fmt: skip
"""What makes a tensor of another one's form, and has none of its values."""


class PickedEntries(DispatchMode):
    """Follows through the operations of a run which memory depends on its inputs, and which was picked by values."""

    def __init__(self, inputs: Iterable[Tensor], batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._is_apart = batch, False
        self._alive: dict[int, StorageWeakRef] = {}
        """As long as these are here, no other memory has the same identity."""
        self._derived: set[int] = set()
        self._picked: dict[int, int] = {}
        """Memory of what was picked, and of how many entries."""
        for tensor in inputs:
            self._derive(tensor)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Follow nothing for a while."""
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False

    def has(self, tensor: Tensor) -> bool:
        """Whether the entries of a tensor were picked by values."""
        return self._memory(tensor) in self._picked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_apart:
            return result
        name = name_of(func)
        given = list(_tensors((*args, *(kwargs or {}).values())))
        if name.rstrip("_") not in _FRESH and any(map(self._is_derived, given)):
            made = list(_tensors((result,)))
            for tensor in made:
                self._derive(tensor)
            self._note(name.strip("_"), args, given, made)
        return result

    def _note(self, name: str, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        source = given[0]
        if name in _READS:
            dims = self._dims_picked(source, *args[1:3]) if self._is_derived(source) else []
            if self.has(source):  # put back into their order
                self._mark(made, None if dims else self._picked[self._memory(source) or 0])
            elif self._may_hold_rows(source, dims):
                self._mark(made, source.shape[min(dims)])
        elif name in _WRITES:
            self._note_written(args, given, made)
        else:
            sizes = [self._picked[place] for one in given if (place := self._memory(one)) in self._picked]
            if sizes:
                self._mark(made, None if self._has_a_partner(given) else sizes[0])

    def _note_written(self, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note what is written to places that depend on values: in their order again, or picked by that."""
        target, values = given[0], given[-1]
        dims = self._dims_picked(target, *args[1:3])
        size = self._picked.get(self._memory(values) or 0)
        if size is not None:
            self._mark(made, None if size in target.shape else size)
        elif values is not target and self._is_derived(values) and values.dim() > 1 and 0 in dims:
            self._mark(made, target.shape[0])

    def _has_a_partner(self, given: Sequence[Tensor]) -> bool:
        """Whether what was picked meets activations entry by entry that were not: it is in their order again."""
        sizes = {one.shape[0] for one in given if one.dim() > 1 and self.has(one)}
        others = (one for one in given if one.dim() > 1 and self._is_derived(one) and not self.has(one))
        return any(one.shape[0] in sizes for one in others)

    def _dims_picked(self, source: Tensor, first: Any, second: Any = None) -> list[int]:
        """Return along which dimensions an operation's arguments say, depending on values, which entries are meant."""
        if isinstance(first, int):  # gather, index_select, scatter: dimension and index
            return [first % max(1, source.dim())] if isinstance(second, Tensor) and self._is_derived(second) else []
        if isinstance(first, Tensor):  # embedding and a mask: an index of the first dimension, or of all of them
            return list(range(source.dim())) if self._is_derived(first) else []
        dims, place = list[int](), 0
        for index in first or ():
            width = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
            if isinstance(index, Tensor) and self._is_derived(index):
                dims += range(place, place + width)
            place += width
        return dims

    def _may_hold_rows(self, source: Tensor, dims: Sequence[int]) -> bool:
        """Whether the batch may be along one of these dimensions: of features it never is, nor if another one is it."""
        if source.dim() > 1:
            dims = [dim for dim in dims if dim < source.dim() - 1]
        others = [size for dim, size in enumerate(source.shape[:-1]) if dim not in dims]
        return self._batch not in others and any(source.shape[dim] % self._batch == 0 for dim in dims)

    def _mark(self, tensors: Iterable[Tensor], size: int | None) -> None:
        for tensor in tensors:
            place = self._memory(tensor)
            if place is not None and size is None:
                self._picked.pop(place, None)
            elif place is not None and size is not None:
                self._picked[place] = size

    def _derive(self, tensor: Tensor) -> None:
        place = self._memory(tensor)
        if place is not None and place not in self._derived:
            self._alive[place] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._derived.add(place)

    def _is_derived(self, tensor: Tensor) -> bool:
        return self._memory(tensor) in self._derived

    def _memory(self, tensor: Tensor) -> int | None:
        try:
            return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        except (NotImplementedError, RuntimeError):  # tensor subclasses without memory of their own
            return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_READS = frozenset(
    {"index", "unsafe_index", "gather", "index_select", "masked_select", "take", "embedding", "unsafe_masked_index"}
)
_WRITES = frozenset(
    {"index_put", "index_put_impl", "unsafe_index_put", "index_copy", "index_add", "index_reduce", "scatter",
     "scatter_add", "scatter_reduce", "masked_scatter"}
)  # fmt: skip
