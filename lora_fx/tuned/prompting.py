"""Where adapters with an invocation act in the calls of `generate`: the prompt tells, or offsets of the caller's."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import SWITCH
from lora_fx.adapters.selection import Switch
from lora_fx.adapters.tokens import NEVER, OFFSETS, last_occurrences
from lora_fx.errors import RefusedError
from lora_fx.models.swap import Swapped
from lora_fx.tuned.caches import length_of

_ADVICE = f"give `input_ids`, or `{OFFSETS}` for each row, or choose other adapters by lora_fx.use"


class Generates(Swapped, nn.Module):
    """Mixin for a model that generates: in all calls that this makes, the prompt tells where adapters act."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        offsets = kwargs.pop(OFFSETS, None)
        with _prompted(self, args, kwargs, offsets):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@dataclass(slots=True, eq=False)
class Prompt:
    """What a prompt says of the calls that generate from it."""

    switch: Switch
    given: tuple[Tensor, ...]
    """Its ids, its embeddings, or both: [batch, tokens, …]."""
    starts: dict[str, Tensor]
    """Of each adapter: the place in each row from which on it acts."""
    covered: int = 0
    """How many of its tokens calls have had."""

    def starts_in(self, stream: Tensor, cache: Any) -> dict[str, Tensor]:
        """Return the first token of each row of a call on which each adapter acts.

        Each prompt has as many rows, next to each other: beams, or sequences that are returned.

        Args:
            stream: ids or embeddings of the call's tokens.
            cache: what it goes on from.

        Raises:
            RefusedError: the call does not have the prompt's tokens, or goes on from others.
        """
        (rows, tokens), (batch, length) = self.given[0].shape[:2], stream.shape[:2]
        before = length_of(cache)
        if before is None and length >= tokens:
            before = 0
        if batch % rows or (before is None and length > 1):
            raise self._unclear(stream, "call the model itself")
        if before is None:  # a state of another kind than a KV cache holds all of the prompt
            before = tokens
        if not self._has(stream, before, batch // rows):
            raise self._unclear(stream, "leave out what makes `generate` call the model with other tokens besides")
        self.covered = max(self.covered, min(before + length, tokens))
        return {name: start.repeat_interleave(batch // rows) - before for name, start in self.starts.items()}

    def _has(self, stream: Tensor, before: int, each: int) -> bool:
        """Whether tokens that come after so many others are the prompt's, as far as it has some there."""
        tokens = self.given[0].shape[1]
        if before >= tokens:
            return self.covered == tokens
        kind = stream.is_floating_point()
        own = next((one[:, before:] for one in self.given if one.is_floating_point() == kind), None)
        if own is None:
            return False
        common = min(own.shape[1], stream.shape[1])
        expected = own[:, :common].repeat_interleave(each, 0)
        return bool((stream[:, :common].to(expected.device) == expected).all())

    def _unclear(self, stream: Tensor, advice: str) -> RefusedError:
        facts = [("the prompt", str(list(self.given[0].shape[:2]))), ("a call", str(list(stream.shape[:2])))]
        return RefusedError("which tokens a call generates from cannot be seen", facts, advice)


_PROMPTS: ContextVar[tuple[Prompt, ...]] = ContextVar("lora_fx_prompts", default=())


def prompt_of(switch: Switch) -> Prompt | None:
    """Return the prompt from which this thread generates with a model, if it does."""
    return next((one for one in reversed(_PROMPTS.get()) if one.switch is switch), None)


@contextlib.contextmanager
def _prompted(
    tuned: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], offsets: object = None
) -> Iterator[None]:
    """Let the prompt of `generate` tell where adapters act, if any of them with an invocation is used."""
    switch: Switch = tuned.__dict__[SWITCH]
    used = [name for name in switch.now().names if name in switch.invocations]
    if not used:
        yield
        return
    candidates = (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
    ids = next((value for value in candidates if isinstance(value, Tensor)), None)
    if ids is not None and ids.dim() == 1:
        ids = ids.unsqueeze(0)
    given = [one for one in (ids if are_ids(ids) else None, kwargs.get("inputs_embeds")) if isinstance(one, Tensor)]
    if not given or (offsets is None and not are_ids(given[0])):
        raise without_ids(switch, used)
    _refuse_moving(given, kwargs)
    starts = starts_given(switch, offsets, *given[0].shape[:2]) if offsets is not None else {}
    for name, tokens in switch.invocations.items() if offsets is None else ():
        starts[name] = last_occurrences(given[0], tokens, kwargs.get("attention_mask"))
    before = _PROMPTS.get()
    _PROMPTS.set((*before, Prompt(switch, tuple(given), starts)))
    try:
        yield
    finally:
        _PROMPTS.set(before)


def _refuse_moving(given: Sequence[Tensor], kwargs: Mapping[str, Any]) -> None:
    """Raise RefusedError for prompts of which it would not be seen which row of a call is whose."""
    if len({one.shape[1] for one in given}) > 1:
        facts = [("input_ids", str(list(given[0].shape))), ("inputs_embeds", str(list(given[1].shape)))]
        raise RefusedError("ids and embeddings of a prompt are of as many tokens", facts, "give one of them")
    if kwargs.get("custom_generate") is not None and len(given[0]) > 1:
        facts = [("custom_generate", f"{len(given[0])} prompts")]
        advice = "generate from one prompt after the other"
        raise RefusedError("other code may move rows of one prompt to another's place unseen", facts, advice)


def starts_given(switch: Switch, offsets: object, batch: int, tokens: int) -> dict[str, Tensor]:
    """Return the first token of each row on which each adapter acts, of offsets that the caller gives.

    Args:
        switch: of the model.
        offsets: for each row on how many of its last tokens adapters act, None or 0: on none; or a dict of such, by the
            adapters' names.
        batch: number of rows.
        tokens: of each row.

    Raises:
        ValueError: other numbers than one for each row, negative ones, or a name without an invocation.
    """
    if isinstance(offsets, Mapping):
        unknown = [name for name in offsets if name not in switch.invocations]
        if unknown:
            known = ", ".join(switch.invocations)
            raise ValueError(f"{OFFSETS} is for adapters with an invocation, {known}, not for {unknown[0]!r}")
        named = {name: offsets.get(name, [None] * batch) for name in switch.invocations}
    else:
        named = dict.fromkeys(switch.invocations, offsets)
    return {name: _starts(of_rows, batch, tokens) for name, of_rows in named.items()}


def _starts(offsets: object, batch: int, tokens: int) -> Tensor:
    numbers = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    if not isinstance(numbers, Iterable) or isinstance(numbers, str):
        raise ValueError(f"{OFFSETS} must be a list with a number, or None, for each row")
    numbers = [0 if number is None else number for number in numbers]
    if len(numbers) != batch or any(type(one) is not int or one < 0 for one in numbers):
        raise ValueError(f"{OFFSETS} must have a number from 0 on, or None, for each of {batch} rows: {offsets!r}")
    return torch.tensor([tokens - one if one else NEVER for one in numbers])


def are_ids(value: object) -> bool:
    """Whether a value can be ids of tokens, [batch, tokens]."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def are_embeddings(value: object) -> bool:
    """Whether a value can be embeddings of tokens, [batch, tokens, features]."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()


def without_ids(switch: Switch, used: Sequence[str]) -> RefusedError:
    """Return the error for a call that does not show where adapters act."""
    facts = [(f"'{name}'", f"has the invocation {list(switch.invocations[name])}") for name in used]
    return RefusedError("adapters act from an invocation on, and there are no ids to find it in", facts, _ADVICE)
