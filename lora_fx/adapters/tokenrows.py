"""Rows of a weight that are trained alone: a small parameter [n, d] that stands for n rows of W [V, d].

With one adapter's rows in use, an embedding looks the ids up in W, and those that are trained in the rows; a head that
is tied to it multiplies by W and by what the rows have moved.  Neither forms a weight of W's size, nor a gradient of
it.  Whatever else reads the weight gets W with the rows in it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenRows(nn.Module):
    """The values of some rows of a weight."""

    rows: nn.Parameter

    def __init__(self, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.ids = tuple(ids)
        """In ascending order, each once."""
        self.rows = rows
        self._index = _index_of(self.ids, rows.device)

    def index(self, device: torch.device) -> Tensor:
        """Return the ids as a tensor on a device, [n]."""
        kept: Tensor = self.__dict__["_index"]
        if kept.device == device:
            return kept
        made = _index_of(self.ids, device)
        if type(made) is Tensor:  # not one of a mode's own
            self.__dict__["_index"] = made
        return made

    def extra_repr(self) -> str:
        """Return how many rows there are, and how wide they are."""
        return f"{len(self.ids)}, {self.rows.shape[1]}"


def _index_of(ids: Sequence[int], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may be needed for a backward pass
        return torch.tensor(ids, dtype=torch.int64, device=device)


def with_rows(weight: Tensor, base: Tensor, used: Sequence[tuple[TokenRows, float]]) -> Tensor:
    """Return a weight [V, d] with rows in it: weight + Σ share · (rows - base); where nothing else is there, the rows.

    Args:
        weight: what the base has become by what else is used.
        base: as it is without any adapter.
        used: rows, each with its share.
    """
    seen, is_base = set[int](), weight is base
    for one, share in used:
        index, rows = one.index(weight.device), one.rows.to(weight.dtype)
        if share == 1 and is_base and seen.isdisjoint(one.ids):
            weight = weight.index_copy(0, index, rows)
        else:
            weight = weight.index_add(0, index, share * (rows - base.index_select(0, index)))
        seen.update(one.ids)
    return weight


def embedded(layer: nn.Embedding, input: Tensor, one: TokenRows) -> Tensor:
    """Return what an embedding gives with the rows of one adapter in its weight; bit-equal to looking up in that."""
    weight = layer._parameters["weight"]
    assert weight is not None
    known = one.index(weight.device)
    place = torch.searchsorted(known, input.to(known.dtype)).clamp_(max=len(one.ids) - 1)
    is_there = (known[place] == input).unsqueeze(-1)
    trained = F.embedding(place, one.rows.to(weight.dtype))
    return torch.where(is_there, trained, F.embedding(input, weight, layer.padding_idx, sparse=layer.sparse))


def looks_up_plainly(layer: nn.Embedding, one: TokenRows) -> bool:
    """Whether an embedding looks up and does nothing else, in the forward or in the backward pass of these rows."""
    is_padded = layer.padding_idx is not None and layer.padding_idx in one.ids
    return layer.max_norm is None and not layer.scale_grad_by_freq and not is_padded


def multiplied(layer: nn.Linear, input: Tensor, one: TokenRows) -> Tensor:
    """Return what a linear gives with the rows of one adapter in its weight: y + (rows - W) x in their columns.

    So that rows which nothing has moved change no bit: a product of a few rows is summed otherwise than one of all.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    index = one.index(weight.device)
    moved = (one.rows - weight.index_select(0, index).to(one.rows.dtype)).to(weight.dtype)
    whole = F.linear(input, weight, layer.bias)
    return whole.index_add(-1, index, F.linear(input, moved))
