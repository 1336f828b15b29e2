"""Rows of a weight that are trained alone: a small parameter [n, d] that stands for n rows of W [V, d].

With one adapter's rows in use, an embedding looks the ids up in W, and those that are trained in the rows; a head that
is tied to it multiplies by W and by what the rows have moved.  Neither forms a weight of W's size, nor a gradient of
it.  Whatever else reads the weight gets W with the rows in it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.text import listing

IDS = "_extra_state"
"""The end of the key under which a state has the ids of rows, which stand beside it under `rows`."""


def same_ids(one: object, other: object) -> bool:
    """Whether two values of that key are the ids of the same tokens."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.is_meta or other.is_meta:
        return False
    return one.shape == other.shape and one.tolist() == other.tolist()


def told_ids(ids: object) -> str:
    """Return the ids of a state as they are shown."""
    if not isinstance(ids, Tensor) or ids.is_meta:
        return "that it does not tell"
    return listing(map(str, ids.flatten().tolist()), 20)


class TokenRows(nn.Module):
    """The values of some rows of a weight."""

    rows: nn.Parameter

    def __init__(self, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.ids = tuple(ids)
        """In ascending order, each once."""
        self.rows = rows
        self._index = _index_of(self.ids, rows.device)

    def get_extra_state(self) -> Tensor:
        """Return the ids for a state dict, under `_extra_state` beside `rows`."""
        return torch.tensor(self.ids, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: ids are compared before, and never taken over."""

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        """Take the rows of a state dict; where it says that they are of other tokens, add an error of torch's."""
        given = state.get(prefix + IDS)
        if given is not None and not same_ids(given, self.get_extra_state()):
            told = f"rows of tokens {told_ids(given)} in the place of those of {told_ids(self.get_extra_state())}"
            errors.append(f"{prefix}rows: {told}")
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)

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
