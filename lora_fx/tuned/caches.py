"""What a KV cache carries of adapters that act from an invocation on: in which rows they have begun to."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.tokens import Tokens
from lora_fx.capture.calls.objects import is_plain_object, tensors_in
from lora_fx.errors import RefusedError

_NOTE = "lora_fx_invoked"


@dataclass(slots=True, eq=False)
class CacheNote:
    """What was seen of the tokens in a cache."""

    acts: dict[str, Tensor]
    """Of each adapter: in which rows it acts, [batch]."""
    last: Tensor
    """The last ids of each row: an invocation may begin among them."""
    keys: Any
    """The keys as they were then: a cache whose rows were moved, repeated or cut off has others."""


def write_note(cache: Any, before: CacheNote | None, tokens: Tokens, ids: Tensor, longest: int) -> None:
    """Note on a cache what a call has put into it, in place.

    Args:
        cache: after the call.
        before: what it carried before.
        tokens: on which of the call's tokens adapters act.
        ids: of the call.
        longest: how many of the last ids of each row are kept.
    """
    acts = {name: start < tokens.length for name, start in tokens.starts.items()}
    last = ids if before is None else torch.cat((before.last.to(ids.device, ids.dtype), ids), 1)
    cache.__dict__[_NOTE] = CacheNote(acts, last[:, max(last.shape[1] - longest, 0) :], keys_of(cache))


def note_of(cache: Any, batch: int, refuses: bool) -> CacheNote | None:
    """Return what a cache carries; None if nothing, as one that the base alone has filled, or if it was changed since.

    Raises:
        RefusedError: with `refuses`, where adapters act in rows of a cache that code has changed since.
    """
    note: CacheNote | None = getattr(cache, "__dict__", {}).get(_NOTE)
    if note is None or length_of(cache) == 0:
        return None
    if note.keys is keys_of(cache) and len(note.last) == batch:
        return note
    acting = [name for name, rows in note.acts.items() if bool(rows.any())] if refuses else []
    if acting:
        raise RefusedError(
            "adapters act in rows of this cache, and in which is not known since its rows were moved or cut off",
            [(f"'{name}'", "acts from its invocation on") for name in acting],
            "call `generate`, or give all tokens at once",
        )
    return None


def keys_of(cache: Any) -> Any:
    """Return the keys of a cache's first layer; None if it does not show them."""
    layers = getattr(cache, "layers", None)
    return getattr(layers[0], "keys", None) if layers else None


def length_of(cache: Any) -> int | None:
    """Return how many tokens a cache holds, 0 without one; None if it does not say."""
    if cache is None:
        return 0
    ask = getattr(cache, "get_seq_length", None)
    return int(ask()) if callable(ask) else None


def cache_in(values: Iterable[Any]) -> Any:
    """Return what carries the state from call to call, among arguments or results: the first object with tensors in it.

    Tuples and lists are left out: results have some of other things.
    """
    return next((value for value in values if is_plain_object(value) and _holds_tensors(value)), None)


def refuse_bare(values: Iterable[Any]) -> None:
    """Raise RefusedError for arguments that are a state and can carry nothing, as tuples of keys and values."""
    kinds = [type(value).__name__ for value in values if isinstance(value, (tuple, list)) and _holds_tensors(value)]
    if kinds:
        raise RefusedError(
            "adapters act from an invocation on, and what comes from the call before does not say where",
            [(f"a {kind} of tensors", "carries nothing else") for kind in kinds],
            "use the caches of transformers, or give all tokens at once",
        )


def _holds_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None
