"""What a KV cache carries of adapters that act from an invocation on: in which rows they have begun to."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
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

    acts: dict[tuple[int, ...], Tensor]
    """Of each invocation, whatever the adapters are called: in which rows it has been met, [batch]."""
    last: Tensor
    """The last ids of each row: an invocation may begin among them."""
    tensors: "Tensors"
    """Of the cache as they were then: one whose rows were moved, repeated or cut off has others, or has written."""


UNKNOWN = -1
"""In place of an id, of a token that came as an embedding."""


class Tensors:
    """Which tensors a state has, and how often each was written to; it keeps none of them alive."""

    def __init__(self, state: Any) -> None:
        found = list(tensors_of(state))
        self._versions: tuple[tuple[weakref.ref[Tensor], int], ...] | None
        self._versions = tuple((weakref.ref(one), _version(one)) for one in found)
        self._sums = _sums(found)

    def are_those_of(self, state: Any) -> bool:
        """Whether a state has them still, as they were."""
        found = list(tensors_of(state))
        known = self._versions
        if known is None or len(found) != len(known):
            return False
        if not all(ref() is one and at == _version(one) for one, (ref, at) in zip(found, known, strict=True)):
            return False
        now = _sums(found)
        return (now is None) == (self._sums is None) and (now is None or torch.equal(now, self._sums))

    def __reduce__(self) -> Any:  # weak references are not copied with what they mean
        held = [ref() for ref, _ in self._versions or ()]
        as_then = all(
            one is not None and _version(one) == at for one, (_, at) in zip(held, self._versions or (), strict=True)
        )
        return _of_copies, (held if as_then and self._versions is not None else None,)


def _of_copies(held: list[Tensor] | None) -> Tensors:
    made = Tensors(held or [])
    if held is None:
        made._versions = None
    return made


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else int(tensor._version)


def _sums(tensors: Iterable[Tensor]) -> Any:
    """Return a sum over each row of the first tensor whose writes nobody counts, as of inference mode."""
    first = next((one for one in tensors if one.is_inference() and one.dim() > 2 and one.is_floating_point()), None)
    return None if first is None else first.flatten(1).double().sum(1)


def tensors_of(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, without those of the note on it."""
    held = getattr(state, "__dict__", None)
    return tensors_in(state if held is None else [value for name, value in held.items() if name != _NOTE])


def write_note(
    cache: Any, before: CacheNote | None, tokens: Tokens, ids: Tensor, invocations: Mapping[str, tuple[int, ...]]
) -> None:
    """Note on a cache what a call has put into it, in place.

    Args:
        cache: after the call.
        before: what it carried before.
        tokens: on which of the call's tokens adapters act.
        ids: of the call; UNKNOWN where it was given none.
        invocations: of each adapter; as many of the last ids of each row are kept as may begin one.
    """
    longest = max(map(len, invocations.values()), default=1) - 1
    acts = {invocations[name]: start < tokens.length for name, start in tokens.starts.items() if name in invocations}
    last = ids if before is None else torch.cat((before.last.to(ids.device, ids.dtype), ids), 1)
    cache.__dict__[_NOTE] = CacheNote(acts, last[:, max(last.shape[1] - longest, 0) :], Tensors(cache))


def note_of(cache: Any, batch: int, used: Mapping[str, tuple[int, ...]]) -> CacheNote | None:
    """Return what a cache carries; None if it is empty, or nobody needs to know.

    Of one that another model has filled, or that was changed since, its tokens are unknown, and no adapter acts in it.

    Args:
        cache: that a call is given.
        batch: rows of the call.
        used: the invocations of the adapters that need to know.

    Raises:
        RefusedError: adapters act in rows of a cache that code has changed since; or were not there when it was filled.
    """
    note: CacheNote | None = getattr(cache, "__dict__", {}).get(_NOTE)
    if cache is None or length_of(cache) == 0:
        return None
    if note is None:
        return None if length_of(cache) is None else _unseen(cache, batch, used)
    if later := [(f"'{name}'", "was added later") for name, ids in used.items() if ids not in note.acts]:
        advice = "give all tokens at once"
        raise RefusedError("nobody has looked for the invocations of adapters in this cache", later, advice)
    if note.tensors.are_those_of(cache) and len(note.last) == batch:
        return note
    acting = [name for name, ids in used.items() if bool(note.acts[ids].any())]
    if acting:
        raise RefusedError(
            "adapters act in rows of this cache, and in which is not known since its rows were moved or cut off",
            [(f"'{name}'", "acts from its invocation on") for name in acting],
            "call `generate`, or give all tokens at once",
        )
    return _unseen(cache, batch, used)


def _unseen(cache: Any, batch: int, used: Mapping[str, tuple[int, ...]]) -> CacheNote | None:
    """Return what is known of a cache whose tokens nobody has seen: an invocation may begin among the last."""
    longest = max(map(len, used.values()), default=1) - 1
    if not longest:
        return None
    acts = {ids: torch.zeros(batch, dtype=torch.bool) for ids in used.values()}
    return CacheNote(acts, torch.full((batch, longest), UNKNOWN), Tensors(cache))


def length_of(cache: Any) -> int | None:
    """Return how many tokens a cache holds, 0 without one; None if it does not say."""
    if cache is None:
        return 0
    ask = getattr(cache, "get_seq_length", None)
    return int(ask()) if callable(ask) else None


def cache_in(values: Iterable[Any]) -> Any:
    """Return what carries the state from call to call, among arguments or results: an object with tensors in it.

    Of several one with a note, else one that says how many tokens it holds, else the first.  Tuples and lists are left
    out: results have some of other things.
    """
    found = [value for value in values if is_plain_object(value) and _holds_tensors(value)]
    noted = (one for one in found if _NOTE in vars(one))
    counted = (one for one in found if callable(getattr(one, "get_seq_length", None)))
    return next(iter((*noted, *counted, *found)), None)


def refuse_bare(values: Iterable[Any]) -> None:
    """Raise RefusedError for arguments that are a state and can carry nothing, as tuples of keys and values."""
    kinds = [type(value).__name__ for value in values if _is_bare(value)]
    if kinds:
        raise RefusedError(
            "adapters act from an invocation on, and what comes from the call before does not say where",
            [(f"a {kind} of tensors", "carries nothing else") for kind in kinds],
            "use the caches of transformers, or give all tokens at once",
        )


def _is_bare(value: Any) -> bool:
    if isinstance(value, (tuple, list, Mapping)):
        return _holds_tensors(value)
    is_state = callable(getattr(value, "get_seq_length", None))
    return is_state and not is_plain_object(value)  # with slots: nothing can be written on it, nor its tensors found


def _holds_tensors(value: Any) -> bool:
    return next(tensors_of(value), None) is not None
