"""An adapter for each row of a batch: what each adds to its own rows of a layer's output.

Where a layer's input has the batch is not guessed: it is seen before, in runs of the model (`tuned/rows.py`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_fx.adapters.stacked import Plain, Stacked, StackedFactors, can_be_kept, stacked
from lora_fx.errors import RefusedError
from lora_fx.models.torch_internals import in_backward

Added = Callable[[Tensor, Tensor, str], Tensor]
"""Returns a base output with the adapter of that name in it, given the base output and the layer's input."""


LAYOUTS = "lora_fx_row_layouts"
"""Attribute of an adapted layer: where the batch is in its inputs, by how many dimensions they have."""


LOOKS = "lora_fx_looks"
"""Attribute of the hook that a model has in a context of `lora_fx.rows`: what is made of it shall not have it."""


Unclear = dict[str, list[tuple[str, str]]]
"""Of adapters: the layers, by path and what their input is, of which it does not show where the batch is."""


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


class SeesInputs(Protocol):
    """What is told of the inputs of adapted layers while it is looked where the batch is."""

    def note(self, layer: nn.Module, x: Tensor) -> None:
        """Note an input of a layer."""


@dataclass(slots=True, eq=False)
class AdapterRows:
    """The adapters of a batch, row by row."""

    names: tuple[str | None, ...]
    seen_calls: dict[Any, Unclear] = field(default_factory=dict)
    """Kinds of calls of the model in which it was seen where the batch is, and of which layers it was not."""
    models: tuple[nn.Module, ...] = ()
    """The model whose calls are looked at, and parts of it that are called by themselves."""
    dim: int = 0
    """The dimension of their inputs that is the batch."""
    inside: set[int] = field(default_factory=set)
    """Of which of these models a call is running, by their ids."""
    leave: Callable[[], None] | None = None
    """Ends the choice, of rows that hold for one call of a part."""
    seen: "SeesInputs | None" = None
    """While it is looked where the batch is: what has been seen."""
    owners: dict[frozenset[str], Owners] = field(default_factory=dict)
    kept: StackedFactors | None = None
    """The stacked factors that the model keeps for these adapters; None: they are made for each call."""
    compared: Literal["", "context", "call"] = ""
    """Since what began those have been compared with the adapters' values."""

    def layout_of(self, layer: Any, path: str, x: Tensor) -> Layout:
        """Return where the batch is in a layer's input.

        Raises:
            RefusedError: it is not known, or there is another number of rows.
        """
        batch = len(self.names)
        layout = Layout() if batch == 1 else layer.__dict__.get(LAYOUTS, {}).get(x.dim())
        apart = (
            layout is not None and layout.is_sure and not self.inside and not in_backward()
        )  # no one has counted rows
        if layout is None or (apart and batch > 1):
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

    def stacked(self, layer: nn.Module, owners: Owners, factors: Mapping[str, Plain]) -> Stacked:
        """Return the factors of a layer for the names of the owners, as the model has kept them or made now."""
        if self.kept is None or not can_be_kept(factors):
            return stacked(owners.names, factors)
        if self.compared != "call":
            self.kept.compare(trained_alone=self.compared == "context")
            self.compared = "call"
        return self.kept.of(layer, owners.names, factors)

    def begin_call(self) -> None:
        """Note that a call of the model begins: what is trained may have changed since the last one."""
        if self.compared == "call":
            self.compared = "context"

    def among(self, held: frozenset[str]) -> Owners:
        """Return whose the rows are among the adapters that a layer has."""
        if held not in self.owners:
            wanted = [name if name in held else None for name in self.names]
            names = tuple(dict.fromkeys(wanted))
            self.owners[held] = Owners(names, tuple(map(names.index, wanted)))
        return self.owners[held]


def with_plain_rows(base: Tensor, x: Tensor, layout: Layout, owners: Owners, factors: Stacked) -> Tensor:
    """Return a linear layer's output with the adapter of each row in it, by two batched products.

    For the rows i of a batch: yᵢ = baseᵢ + scaling · xᵢ Aᵀ Bᵀ, with A [r, in] and B [out, r] of its own adapter.
    Without gradients `base` is used up.
    """
    batch = len(owners.numbers)
    given, result = layout.split(x, batch), layout.split(base, batch)
    (A, B, scaling), parts = factors, len(owners.names)
    if not owners.are_runs:
        numbers = torch.tensor(owners.numbers, device=A.device)
        A, B, parts = A.index_select(0, numbers), B.index_select(0, numbers), batch
        scaling = scaling.index_select(0, numbers) if isinstance(scaling, Tensor) else scaling
    flat, onto = given.reshape(parts, -1, x.shape[-1]), result.reshape(parts, -1, base.shape[-1])
    h = torch.bmm(flat if flat.dtype == A.dtype else flat.to(A.dtype), A.transpose(1, 2)) * scaling
    B = B.transpose(1, 2)
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


def tell_apart(tensor: Tensor, are_ids: bool = False, alike_inside: bool = False) -> None:
    """Make the rows of a batch differ, in place, and the same way at every call; masks and flags stay as they are.

    Args:
        tensor: rows along its first dimension.
        are_ids: whether it is known to be token ids, which may look like a mask: decoders start with one for all rows.
        alike_inside: whether the tokens of a row of numbers are to be nearly one token.
    """
    if tensor.dim() < 2 or tensor.dtype == torch.bool or (not are_ids and _is_mask(tensor)):
        return
    if are_ids and tensor[0].numel() == 1:
        _move_ids(tensor, torch.arange(len(tensor), device=tensor.device))
        return
    generator = torch.Generator().manual_seed(0)
    for number, row in enumerate(tensor):
        if tensor.is_floating_point():
            noise = torch.randn(row.shape, generator=generator).to(row)
            row.add_(noise * row.float().std(correction=0).clamp(min=1e-3).to(row) * 0.5)
            if alike_inside:
                row.copy_(nearly_one_token(row, number))
        elif row.shape[0] > 1:
            row.copy_(row.roll(number, 0))
        else:  # ids below one that is valid are valid too
            row.sub_(number % (row + 1))


def _move_ids(tensor: Tensor, by: Tensor) -> None:
    """Let each row's one id be another one, in place, of those up to the largest; 0 and 1 are always there."""
    largest = tensor.amax().clamp(min=1)
    tensor.copy_((tensor + by.view(-1, *(1,) * (tensor.dim() - 1))) % (largest + 1))


def change(tensor: Tensor, are_ids: bool = False, number: int = -1) -> None:
    """Make a row of a batch, the last if none is said, another one, in place; masks and flags stay as they are."""
    if tensor.dim() < 2 or tensor.dtype == torch.bool or (not are_ids and _is_mask(tensor)):
        return
    row = tensor[number]
    if are_ids and row.numel() == 1:
        by = torch.zeros(len(tensor), dtype=torch.long, device=tensor.device)
        by[number] = 1
        _move_ids(tensor, by)
        return
    if row.numel() > 1:
        row.copy_(row.roll(1, 0 if row.shape[0] > 1 else -1))
    if tensor.is_floating_point():  # what all tokens of a row are summed to changes too
        noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(1)).to(row)
        row.add_(noise * row.float().std(correction=0).clamp(min=1e-3).to(row) * 0.5)
    elif row.numel() == 1:
        row.sub_((row > 0).to(row.dtype))


def nearly_one_token(row: Tensor, number: int) -> Tensor:
    """Return a row of a batch with one of its tokens in place of each, but for a little noise.

    What picks tokens by their values, as a router of experts does, then picks nearly all tokens of a row or none, so
    that it is not taken for a layer that has as many entries of each row by nature.

    Args:
        row: [tokens, features], or of an image [channels, height, width].
        number: of the row: which of its tokens is taken, and the seed of the noise.
    """
    if row.dim() < 2 or not row.numel():
        return row
    token = row[number % row.shape[0]]
    if row.dim() > 2:
        token = row.flatten(1)[:, number % row[0].numel()].view(-1, *(1 for _ in row.shape[1:]))
    noise = torch.randn(row.shape, generator=torch.Generator().manual_seed(number)).to(row)
    return token + noise * (0.01 * row.float().std(correction=0).clamp(min=1e-3).to(row))


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor may be a mask: of two values, as 0 and 1, or with infinite ones."""
    values = tensor.flatten()[:65536]
    if not tensor.is_floating_point():
        return int(values.max()) <= 1
    return not bool(values.isfinite().all()) or len(torch.unique(values)) <= 2


def are_alike(sums: Sequence[Tensor], batch: int) -> bool:
    """Whether nothing in a tensor could tell the rows of a batch apart: the entries of each dimension are equal."""
    rows = [one for one in sums if one.numel() and one.shape[0] % batch == 0]
    return all(bool(((one - one[:1]).abs() <= 1e-6 * one.abs().amax()).all()) for one in rows)


def layouts_that_fit(
    before: Sequence[Tensor], after: Sequence[Tensor], batch: int, tolerance: float
) -> Iterator[Layout]:
    """Yield where the batch may be in a tensor, told by sums of it before and after the rows were moved on by one.

    Args:
        before: for each dimension but the last, a sum over all others for each entry, with weights that tell entries
            apart: [entries, sums].
        after: the same, of a run in which the last row of the batch, changed, stands first.
        batch: number of rows; at least 2.
        tolerance: how far rows may be from where they are expected, of how far they are apart.
    """
    for dim, (one, other) in enumerate(zip(before, after, strict=True)):
        size = one.shape[0]
        if size % batch or not one.numel() or one.shape != other.shape:
            continue
        for is_major in (True, False) if size > batch else (True,):
            layout = Layout(0, is_major, size > batch)
            rows, moved = layout.split(one, batch), layout.split(other, batch)
            spread = (rows - rows.roll(1, 0)).abs().amax()
            wrong = (moved[1:] - rows[:-1]).abs().amax()
            if spread > 1e-6 * one.abs().amax() and wrong < tolerance * spread:
                yield layout._replace(dim=dim)
