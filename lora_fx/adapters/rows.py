"""An adapter for each row of a batch: what each adds to its own rows of a layer's output.

Where a layer's input has the batch is not guessed: it is seen before, in runs of the model (`tuned/rows.py`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import RefusedError

Added = Callable[[Tensor, Tensor, str], Tensor]
"""Returns a base output with the adapter of that name in it, given the base output and the layer's input."""


LAYOUTS = "lora_fx_row_layouts"
"""Attribute of an adapted layer: where the batch is in its inputs, by how many dimensions they have."""


class Layout(NamedTuple):
    """Where the batch is in a tensor: along one dimension, which may hold several entries of each row."""

    dim: int = 0
    is_major: bool = True
    """Whether the entries of one row are neighbours; else those of all rows are, again and again."""
    is_sure: bool = True
    """Whether it was seen in a tensor with several entries of each row; else it tells nothing of those."""

    def split(self, tensor: Tensor, batch: int) -> Tensor:
        """Return the tensor as [batch, entries of a row, …], a view where it can be one."""
        size = tensor.shape[self.dim]
        if self.is_major:
            whole: Tensor = tensor.unflatten(self.dim, (batch, size // batch))  # type: ignore[no-untyped-call]
            return whole.movedim((self.dim, self.dim + 1), (0, 1))
        whole = tensor.unflatten(self.dim, (size // batch, batch))  # type: ignore[no-untyped-call]
        return whole.movedim((self.dim + 1, self.dim), (0, 1))

    def agreed(self, other: "Layout") -> "Layout | None":
        """Return what two layouts of one layer say together; None if they contradict each other."""
        sure = self if self.is_sure else other
        return sure if self.dim == other.dim and (self == other or not (self.is_sure and other.is_sure)) else None

    def joined(self, rows: Tensor) -> Tensor:
        """Return the tensor of which `split` has made these rows."""
        first, second = (self.dim, self.dim + 1) if self.is_major else (self.dim + 1, self.dim)
        return rows.movedim((0, 1), (first, second)).flatten(self.dim, self.dim + 1)


@dataclass(frozen=True)
class Owners:
    """Whose the rows of a batch are, among adapters that a layer has."""

    names: tuple[str | None, ...]
    """Each once; None for rows that none of them has."""
    numbers: tuple[int, ...]
    """For each row, which of the names."""

    @functools.cached_property
    def are_runs(self) -> bool:
        """Whether each name has as many rows as the others, next to each other, in the order of the names."""
        each = len(self.numbers) // len(self.names)
        return self.numbers == tuple(number for number in range(len(self.names)) for _ in range(each))

    def rows_of(self, name: str) -> list[int]:
        """Return the rows that one of the names has."""
        wanted = self.names.index(name)
        return [row for row, number in enumerate(self.numbers) if number == wanted]


class Stacked(NamedTuple):
    """Factors of several adapters, padded with zeros to one rank."""

    A: Tensor
    """[adapters, in, r]."""
    B: Tensor
    """[adapters, r, out], with the scaling in it."""


class Plain(NamedTuple):
    """The factors of an adapter that are multiplied by, and nothing else happens."""

    A: Tensor
    B: Tensor
    scaling: float


@dataclass(slots=True, eq=False)
class AdapterRows:
    """The adapters of a batch, row by row."""

    names: tuple[str | None, ...]
    seen_calls: set[Any] = field(default_factory=set)
    """Kinds of calls of the model in which that was seen."""
    seen: "Seen | None" = None
    """While it is looked where the batch is: what has been seen."""
    owners: dict[frozenset[str], Owners] = field(default_factory=dict)
    factors: dict[nn.Module, "tuple[Any, list[Tensor], Stacked]"] = field(default_factory=dict)
    """Of layers: of what their stacked factors were made, and these."""

    def layout_of(self, layer: Any, path: str, x: Tensor) -> Layout:
        """Return where the batch is in a layer's input.

        Raises:
            RefusedError: it is not known, or there is another number of rows.
        """
        batch = len(self.names)
        layout = Layout() if batch == 1 else layer.__dict__.get(LAYOUTS, {}).get(x.dim())
        if layout is None:
            raise RefusedError(
                "which part of a layer's input belongs to which row of the batch is not known",
                [(path, f"its input is {list(x.shape)}")],
                "call the adapted model itself inside of `lora_fx.rows`, not a part of it",
            )
        if x.shape[layout.dim] % batch:
            raise RefusedError(
                f"adapters are given for {batch} rows",
                [(path, f"its input is {list(x.shape)}, with {x.shape[layout.dim]} along dimension {layout.dim}")],
                "give a name, or None, for each row of the batch",
            )
        if not layout.is_sure and x.shape[layout.dim] > batch:
            self.seen_calls.clear()
            raise RefusedError(
                "which entries of a layer's input belong to which row is not known: there was one for each until now",
                [(path, f"its input is {list(x.shape)}, with {x.shape[layout.dim] // batch} entries for each row")],
                "make the call again: then it is looked up anew",
            )
        return layout

    def stacked(self, layer: nn.Module, owners: Owners, factors: dict[str, Plain]) -> Stacked:
        """Return the factors of a layer for the names of the owners.

        Without gradients they are kept, until one of them changes: a second copy of the adapters' values.  Not beyond
        the context, since versions do not tell of what is written to `.data`, as averages of weights and optimisers do.
        """
        tensors = [tensor for one in factors.values() for tensor in (one.A, one.B)]
        if torch.is_grad_enabled() or any(not tensor.is_leaf or tensor.is_inference() for tensor in tensors):
            return _stacked(owners, factors)
        facts = (owners.names, [(id(tensor), tensor._version, tensor.data_ptr()) for tensor in tensors])
        kept = self.factors.get(layer)
        if kept is None or kept[0] != facts:
            kept = self.factors[layer] = (facts, tensors, _stacked(owners, factors))  # which holds what has these ids
        return kept[-1]

    def among(self, held: frozenset[str]) -> Owners:
        """Return whose the rows are among the adapters that a layer has."""
        if held not in self.owners:
            wanted = [name if name in held else None for name in self.names]
            names = tuple(dict.fromkeys(wanted))
            self.owners[held] = Owners(names, tuple(map(names.index, wanted)))
        return self.owners[held]


def _stacked(owners: Owners, factors: dict[str, Plain]) -> Stacked:
    rank = max(one.A.shape[0] for one in factors.values())
    like = next(iter(factors.values()))
    nothing = Plain(like.A.new_zeros(rank, like.A.shape[1]), like.B.new_zeros(like.B.shape[0], rank), 1.0)
    each = [nothing if name is None else factors[name] for name in owners.names]
    A = [F.pad(one.A, (0, 0, 0, rank - one.A.shape[0])).t() for one in each]
    B = [F.pad(one.B * one.scaling, (0, rank - one.B.shape[1])).t() for one in each]
    return Stacked(torch.stack(A), torch.stack(B))


def with_plain_rows(base: Tensor, x: Tensor, layout: Layout, owners: Owners, stacked: Stacked) -> Tensor:
    """Return a linear layer's output with the adapter of each row in it, by two batched products.

    For the rows i of a batch: yᵢ = baseᵢ + xᵢ Aᵀ Bᵀ, with A [r, in] and B [out, r] of its own adapter.  Without
    gradients `base` is used up.
    """
    batch = len(owners.numbers)
    given, result = layout.split(x, batch), layout.split(base, batch)
    A, B, parts = stacked.A, stacked.B, len(owners.names)
    if not owners.are_runs:
        numbers = torch.tensor(owners.numbers, device=A.device)
        A, B, parts = A.index_select(0, numbers), B.index_select(0, numbers), batch
    flat, onto = given.reshape(parts, -1, x.shape[-1]), result.reshape(parts, -1, base.shape[-1])
    h = torch.bmm(flat if flat.dtype == A.dtype else flat.to(A.dtype), A)
    if h.dtype != onto.dtype or B.dtype != onto.dtype:
        onto = onto + torch.bmm(h, B).to(onto.dtype)
    elif torch.is_grad_enabled():
        onto = torch.baddbmm(onto, h, B)
    else:
        onto.baddbmm_(h, B)
    return layout.joined(onto.reshape(result.shape))


def with_rows(base: Tensor, x: Tensor, layout: Layout, owners: Owners, added: Added) -> Tensor:
    """Return any layer's output with the adapter of each row in it, one adapter after the other."""
    batch = len(owners.numbers)
    given, result = layout.split(x, batch), layout.split(base, batch)
    for name in filter(None, owners.names):
        rows = torch.tensor(owners.rows_of(name), device=x.device)
        part, onto = given.index_select(0, rows), result.index_select(0, rows)
        outputs = added(layout.joined(onto), layout.joined(part), name)
        result = result.index_copy(0, rows, layout.split(outputs, len(rows)))
    return layout.joined(result)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Seen:
    """Inputs of adapted layers in a run, by what tells their entries apart."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[tuple[torch.Size, list[Tensor]]]] = {}
        """For each layer, call by call: the shape, and for each dimension that may hold the batch sums [entries, 2]."""

    def note(self, layer: nn.Module, x: Tensor) -> None:
        """Note an input of a layer."""
        dims = x.dim() if isinstance(layer, nn.Embedding) else 1 if isinstance(layer, _CONVOLUTIONS) else x.dim() - 1
        self.inputs.setdefault(layer, []).append((x.shape, [_sums(x, dim) for dim in range(dims)]))


def _sums(x: Tensor, dim: int) -> Tensor:
    """Return two sums over all other dimensions for each entry of one, with weights that are the same at every call."""
    entries = x.detach().movedim(dim, 0).flatten(1).float().nan_to_num(0.0, 0.0, 0.0)
    weights = torch.randn((entries.shape[1], 2), generator=torch.Generator().manual_seed(0))
    return entries @ weights.to(entries.device)


def tell_apart(tensor: Tensor) -> None:
    """Make the rows of a batch differ, in place, and the same way at every call; masks and flags stay as they are."""
    if tensor.dim() < 2 or tensor.dtype == torch.bool or _is_mask(tensor):
        return
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(tensor):
        if tensor.is_floating_point():
            noise = torch.randn(row.shape, generator=generator).to(row)
            row.add_(noise * row.float().std(correction=0).clamp(min=1e-3).to(row) * 0.5)
        elif row.shape[0] > 1:
            row.copy_(row.roll(number, 0))
        else:  # ids below one that is valid are valid too
            row.sub_(number % (row + 1))


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor may be a mask: of two values, as 0 and 1, or with infinite ones."""
    values = tensor.flatten()[:65536]
    if not tensor.is_floating_point():
        return int(values.max()) <= 1
    return not bool(values.isfinite().all()) or len(torch.unique(values)) <= 2


def are_alike(sums: Sequence[Tensor], batch: int) -> bool:
    """Whether nothing in a tensor could tell the rows of a batch apart: the entries of each dimension are equal."""
    rows = [one for one in sums if one.shape[0] % batch == 0]
    return all(bool(((one - one[:1]).abs() <= 1e-6 * one.abs().amax()).all()) for one in rows)


def layouts_that_fit(before: Sequence[Tensor], after: Sequence[Tensor], batch: int) -> Iterator[Layout]:
    """Yield where the batch may be in a tensor, told by sums of it before and after the rows were moved on by one.

    Args:
        before: for each dimension but the last, a sum over all others for each entry, with weights that tell entries
            apart: [entries, sums].
        after: the same, of a run in which the last row of the batch stands first.
        batch: number of rows; at least 2.
    """
    for dim, (one, other) in enumerate(zip(before, after, strict=True)):
        size = one.shape[0]
        if size % batch:
            continue
        for is_major in (True, False) if size > batch else (True,):
            layout = Layout(0, is_major, size > batch)
            expected = layout.joined(layout.split(one, batch).roll(1, 0))
            rows = layout.split(one, batch)
            spread = (rows - rows.roll(1, 0)).abs().amax()
            if spread > 1e-6 * one.abs().amax() and (other - expected).abs().amax() < 0.05 * spread:
                yield layout._replace(dim=dim)
