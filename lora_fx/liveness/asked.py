"""The rows that somebody asks for, of tensors [batch, tokens, …], and the two forms in which they are computed.

What treats rows apart has them one after the other, [1, N, …], as packed rows are.  Attention has its queries by
sequence, [batch, M, …], where M is the most that is asked for of one of them; a sequence of which less is asked has
others besides, which nobody reads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.liveness.padding import FEWEST, Rows, packed_rows, rows_but


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Which rows of [batch, length] are asked for, in ascending order and at least one."""

    rows: Rows
    tokens: Tensor
    """[batch, M]: at which tokens the queries of each sequence are."""
    members: Tensor
    """[batch · M]: which of the N rows each of them is."""
    spots: Tensor
    """[N]: where each row is among the batch · M."""

    @property
    def is_even(self) -> bool:
        """Whether as much is asked for of every sequence, so that both forms have the same rows in the same order."""
        return len(self.spots) == len(self.members)


def asked_of(numbers: Tensor, batch: int, length: int) -> Asked:
    """Return the rows of these numbers, in any order, each once; of none, the first one."""
    wanted = torch.zeros(batch * length, dtype=torch.bool, device=numbers.device)
    wanted[numbers] = True
    if not len(numbers):
        wanted[:1] = True
    rows = rows_but(~wanted.view(batch, length))
    each = wanted.view(batch, length).sum(1)
    most = int(each.max())
    sequence = rows.index // length
    spots = sequence * most + torch.arange(rows.count, device=numbers.device) - (each.cumsum(0) - each)[sequence]
    members = torch.zeros(batch * most, dtype=torch.int64, device=numbers.device)
    members[spots] = torch.arange(rows.count, device=numbers.device)
    return Asked(rows, (rows.index % length)[members].view(batch, most), members, spots)


def is_most(numbers: Tensor, rows: int) -> bool:
    """Whether so many rows are asked for that all of them are as well computed."""
    return len(numbers) > (1 - FEWEST) * rows


def asked_rows(x: Tensor, asked: Asked) -> Tensor:
    """Return the rows that are asked for of x [batch, tokens, …] as [1, N, …]; stands in graphs."""
    return packed_rows(x, asked.rows)


def by_sequence(x: Tensor, asked: Asked) -> Tensor:
    """Return rows [1, N, …] as [batch, M, …]; stands in graphs."""
    flat = x[0] if asked.is_even else x[0].index_select(0, asked.members)
    return flat.view(*asked.tokens.shape, *x.shape[2:]) if flat.is_contiguous() else flat.reshape(
        *asked.tokens.shape, *x.shape[2:]
    )  # fmt: skip


def one_after_the_other(x: Tensor, asked: Asked) -> Tensor:
    """Return rows [batch, M, …] as [1, N, …]; stands in graphs."""
    flat = x.flatten(0, 1)
    return (flat if asked.is_even else flat.index_select(0, asked.spots)).unsqueeze(0)


def at_tokens(x: Tensor, asked: Asked, dims: int, axis: int) -> Tensor:
    """Return the entries of x for the queries, […, M, …], where x is one of so many dimensions, or broadcasts to it.

    Along `axis` it has an entry for every token; along the first, the batch, it may have one for all.
    """
    x = x[(None,) * (dims - x.dim())]
    if x.shape[0] == 1:
        return x[0].movedim(axis - 1, 0)[asked.tokens].movedim(1, axis)
    each = torch.arange(len(x), device=x.device).unsqueeze(1)
    return x.movedim(axis, 1)[each, asked.tokens].movedim(1, axis)


def causal_at(asked: Asked, keys: Tensor) -> Tensor:
    """Return the mask [batch, 1, M, keys] by which a query attends to no later key; stands in graphs."""
    places = torch.arange(keys.shape[-2], device=keys.device)
    return (places <= asked.tokens.unsqueeze(-1)).unsqueeze(1)


def size_with_all(x: Tensor, asked: Asked, axis: int, what: int | str | None) -> object:
    """Return the size that a tensor of the rows that are asked for has with all of them; stands in graphs."""
    sizes = list(x.shape)
    sizes[0], sizes[axis] = asked.rows.batch, asked.rows.length
    shape = torch.Size(sizes)
    if what == "numel":
        return shape.numel()
    return shape if what is None else shape[what]  # type: ignore[index]
