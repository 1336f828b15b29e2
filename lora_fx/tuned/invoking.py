"""Where adapters with an invocation begin to act in a call of a model: read off the ids that it is called with.

A model with such adapters has two hooks.  The first finds the last occurrence of each invocation in the ids of the
call, and lets the thread use its adapters from there on, until the second.  So layers, graphs, and checkpointed blocks
that are made again, ask for it as they ask which adapters are used.  In `generate` the prompt decides.  A KV cache
carries on which rows have met an invocation before.  That layers see the tokens in the order of the ids is not guessed:
at the first call of each kind it is seen in two runs of the base, of which the second has other tokens from some place
on.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import SWITCH, attached_to
from lora_fx.adapters.selection import Selection, Switch, acts_everywhere, switched_off
from lora_fx.adapters.tokens import EVERYWHERE, Tokens, TokensSeen, last_occurrences
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.errors import RefusedError
from lora_fx.liveness.heads import late_modules
from lora_fx.models.swap import Swapped, swap
from lora_fx.regions.install import regions
from lora_fx.regions.survey import trial_twin
from lora_fx.tuned.caches import CacheNote, cache_in, length_of, note_of, refuse_bare, write_note
from lora_fx.tuned.calls import kind_of

SEEN_CALLS = "lora_fx_token_calls"
"""Attribute of an adapted model: in which kinds of calls its layers were seen to have the tokens in their order."""
_ADVICE = "give `input_ids`, or choose other adapters by lora_fx.use"


def find_invocations(tuned: nn.Module) -> None:
    """Let an adapted model find the invocations of its adapters in each of its calls, in place, if it has any."""
    if not tuned.__dict__[SWITCH].invocations or begin_call in tuned._forward_pre_hooks.values():
        return
    tuned.register_forward_pre_hook(begin_call, with_kwargs=True)
    tuned.register_forward_hook(end_call, with_kwargs=True, always_call=True)
    if callable(getattr(tuned, "generate", None)):
        swap(tuned, Generates)


class Generates(Swapped, nn.Module):
    """Mixin for a model that generates: in all calls that this makes, the prompt tells where adapters act."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with _prompted(self, args, kwargs):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@dataclass(slots=True, eq=False)
class _Prompt:
    """What a prompt says of the calls that generate from it."""

    switch: Switch
    ids: Tensor
    starts: dict[str, Tensor]
    """Of each adapter: the place in each row from which on it acts."""

    def starts_in(self, batch: int, length: int, cache: Any) -> dict[str, Tensor]:
        """Return the first token of each row of a call on which each adapter acts.

        Each prompt has as many rows, next to each other: beams, or sequences that are returned.
        """
        rows, tokens = self.ids.shape
        before = length_of(cache)
        if before is None and length >= tokens:
            before = 0
        if batch % rows or (before is None and length > 1):
            facts = [("the prompt", str([rows, tokens])), ("a call", str([batch, length]))]
            raise RefusedError("which tokens a call generates from cannot be seen", facts, "call the model itself")
        if before is None:  # a state of another kind than a KV cache holds all of the prompt
            before = tokens
        return {name: start.repeat_interleave(batch // rows) - before for name, start in self.starts.items()}


_PROMPTS: ContextVar[tuple[_Prompt, ...]] = ContextVar("lora_fx_prompts", default=())


@contextlib.contextmanager
def _prompted(tuned: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Let the prompt of `generate` tell where adapters act, if any of them with an invocation is used."""
    switch: Switch = tuned.__dict__[SWITCH]
    used = [name for name in switch.now().names if name in switch.invocations]
    given = (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1])
    ids = next((value for value in given if isinstance(value, Tensor)), None)
    if not used:
        yield
        return
    if ids is not None and ids.dim() == 1:
        ids = ids.unsqueeze(0)
    if not _are_ids(ids):
        raise _without_ids(switch, used)
    assert ids is not None
    starts = {name: last_occurrences(ids, tokens) for name, tokens in switch.invocations.items()}
    before = _PROMPTS.get()
    _PROMPTS.set((*before, _Prompt(switch, ids, starts)))
    try:
        yield
    finally:
        _PROMPTS.set(before)


def _are_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def _without_ids(switch: Switch, used: list[str]) -> RefusedError:
    facts = [(f"'{name}'", f"has the invocation {list(switch.invocations[name])}") for name in used]
    return RefusedError("adapters act from an invocation on, and there are no ids to find it in", facts, _ADVICE)


# -- a call


@dataclass(slots=True)
class _Invoked:
    """A call that runs."""

    model: nn.Module
    around: contextlib.ExitStack
    ids: Tensor | None = None
    cache: Any = None
    before: CacheNote | None = None
    """What the cache carried when the call began."""
    tokens: Tokens | None = None


class _Running(threading.local):
    """The calls that run in a thread, each inside of the one before it."""

    def __init__(self) -> None:
        self.calls: list[_Invoked] = []


_RUNNING = _Running()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin_call(tuned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let this thread use adapters with an invocation from it on, until the call of the model ends."""
    call = _Invoked(tuned, contextlib.ExitStack())
    _RUNNING.calls.append(call)
    switch: Switch = tuned.__dict__[SWITCH]
    if not switch.invocations:
        return
    selection = switch.now()
    if acts_everywhere():
        call.around.enter_context(switch.chosen_here(replace(selection, tokens=EVERYWHERE)))
        return
    used = [name for name in selection.names if name in switch.invocations]
    if used and getattr(tuned, "_is_replica", False):
        facts = [(f"'{name}'", "acts from its invocation on") for name in used]
        raise RefusedError("replicas of nn.DataParallel do not find invocations", facts, "use DistributedDataParallel")
    named = _by_name(tuned, args, kwargs)
    call.ids, call.cache = _ids_in(named, args), cache_in(named.values())
    if call.ids is None:
        if used:
            raise _without_ids(switch, used)
        return
    prompt = next((one for one in reversed(_PROMPTS.get()) if one.switch is switch), None)
    call.before = note_of(call.cache, len(call.ids), refuses=prompt is None and bool(used))
    call.tokens = _tokens_of(switch, prompt, call, named)
    if used:
        _refuse_packed(named)
        if prompt is None:
            refuse_bare(named.values())
        _look(tuned, call, named, args, kwargs)
        call.around.enter_context(switch.chosen_here(replace(selection, tokens=call.tokens)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def end_call(tuned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """End what `begin_call` has begun, and note on the KV cache in which rows adapters act."""
    if not _RUNNING.calls or _RUNNING.calls[-1].model is not tuned:
        return
    call = _RUNNING.calls.pop()
    call.around.close()
    cache = cache_in((*args, *kwargs.values(), *_values_of(result)))
    if call.ids is None or call.tokens is None or result is None or cache is None:  # None: the call has failed
        return
    longest = max(map(len, tuned.__dict__[SWITCH].invocations.values()), default=1) - 1
    write_note(cache, call.before, call.tokens, call.ids, longest)


def _values_of(result: Any) -> Iterable[Any]:
    """Return what is in the result of a call."""
    if isinstance(result, Mapping):
        return result.values()
    return result if isinstance(result, (tuple, list)) else getattr(result, "__dict__", {}).values()


def _by_name(tuned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by their names."""
    try:
        bound = inspect.signature(tuned.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the forward itself will say what is wrong
        bound = {}
    return {**bound, **kwargs}


def _refuse_packed(named: Mapping[str, Any]) -> None:
    """Raise RefusedError for rows that hold several sequences: the last invocation in a row is that of one of them."""
    places, cut = named.get("position_ids"), named.get("cu_seq_lens_q")
    if cut is None and isinstance(places, Tensor) and places.dim() == 2 and named.get("attention_mask") is None:
        cut = bool((places.diff(dim=1) != 1).any()) or None
    if cut is not None:
        facts = [("position_ids" if named.get("cu_seq_lens_q") is None else "cu_seq_lens_q", "begin anew in a row")]
        advice = "give each sequence a row of its own, padded"
        raise RefusedError("adapters act from an invocation on, and a row holds several sequences", facts, advice)


def _ids_in(named: Mapping[str, Any], args: tuple[Any, ...]) -> Tensor | None:
    """Return the ids of a call's tokens: what is called so, or what comes first."""
    given = (named.get("input_ids"), *args[:1])
    return next((value for value in given if _are_ids(value)), None)


def _tokens_of(switch: Switch, prompt: _Prompt | None, call: _Invoked, named: Mapping[str, Any]) -> Tokens:
    """Return on which tokens of a call each adapter with an invocation acts."""
    ids, note = call.ids, call.before
    assert ids is not None
    batch, length = ids.shape
    kept = named.get("logits_to_keep", 0)
    kept = min(kept, length) if isinstance(kept, int) else 0
    if prompt is not None:
        return Tokens(prompt.starts_in(batch, length, call.cache), batch, length, kept)
    before = ids[:, :0] if note is None else note.last.to(ids.device, ids.dtype)
    known = torch.cat((before, ids), 1)
    starts = {}
    for name, tokens in switch.invocations.items():
        start = last_occurrences(known, tokens) - before.shape[1]
        if note is not None and name in note.acts:
            start = torch.where((start > length) & note.acts[name].to(ids.device), 0, start)
        starts[name] = start
    return Tokens(starts, batch, length, kept)


# -- that layers see the tokens in their order


def _look(
    tuned: nn.Module, call: _Invoked, named: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """See whether adapted layers have the tokens of a call in the order of its ids, unless that is known.

    In a second run of the base each row has other ids from some place of its own on: just these entries of a layer's
    input must change.

    Raises:
        RefusedError: naming each layer whose input does not show the tokens so.
    """
    ids, tokens = call.ids, call.tokens
    assert ids is not None
    assert tokens is not None
    batch, length = ids.shape
    if batch * length == 1:
        return
    seen_calls: set[Any] = tuned.__dict__.setdefault(SEEN_CALLS, set())
    kind = kind_of(tuned, batch, args, kwargs, list(tensors_in((args, kwargs))))
    if kind in seen_calls:
        return
    rows = torch.arange(batch, device=ids.device)
    cuts = (length // 2 + rows) % length if length > 1 else rows % 2
    changes = torch.arange(length, device=ids.device) >= cuts.unsqueeze(1)
    others = torch.where(changes, torch.where(ids > 0, ids - 1, ids + 1), ids)
    real = _not_padding(named.get("attention_mask"), ids)
    with trial_twin(tuned) as twin:
        before, after = (_inputs_of_a_run(twin, ids, given, args, kwargs) for given in (ids, others))
    wrong = []
    for layer, calls in before.items():
        again = after.get(layer, [])
        fits = len(calls) == len(again) and all(
            tokens.fits(shape) and _shows(one, other, changes[:, -shape[1] :], real[:, -shape[1] :])
            for (shape, one), (_, other) in zip(calls, again, strict=True)
        )
        if not fits:
            wrong.append((next(iter(attached_to(layer))).spec.path, f"its input is {list(calls[0][0])}"))
    if wrong:
        raise RefusedError(
            f"these layers do not see the tokens of the call, {list(ids.shape)}, each where it stands and after those "
            "before it",
            wrong,
            "keep these sites out of the rules of an adapter with an invocation",
        )
    seen_calls.add(kind)


def _not_padding(mask: Any, ids: Tensor) -> Tensor:
    """Return which tokens are no padding, [batch, tokens]: what layers see of that is nobody's affair."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(ids) and mask.shape[1] >= ids.shape[1]:
        return mask[:, -ids.shape[1] :].to(ids.device) != 0
    return torch.ones_like(ids, dtype=torch.bool)


def _shows(before: Tensor, after: Tensor, changes: Tensor, real: Tensor) -> bool:
    """Whether sums over each token's features changed from the first changed token of each row on, and nowhere else.

    Args:
        before: of one run, [batch, tokens, sums].
        after: of the other.
        changes: which tokens are others there, [batch, tokens].
        real: which are no padding.
    """
    scale = before.abs().amax() + after.abs().amax()
    difference = (before - after).abs().amax(-1)
    if bool((difference[real & ~changes] > 1e-5 * scale).any()):
        return False
    changed = real & changes
    first = difference.gather(1, changed.int().argmax(1, keepdim=True))[:, 0]
    return bool((first[changed.any(1)] > 0).all())


def _inputs_of_a_run(
    twin: nn.Module, ids: Tensor, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, list[tuple[torch.Size, Tensor]]]:
    """Return for each layer with such an adapter, call by call, sums over the features of each token."""
    args, kwargs = copied((args, kwargs), lambda tensor: (given if tensor is ids else tensor).detach().clone())
    switch: Switch = twin.__dict__[SWITCH]
    seen = TokensSeen()
    chosen = replace(Selection.of(switch.invocations), tokens=Tokens(seen=seen))
    off = (*(region for _, _, region in regions(twin)), *(state for _, state in late_modules(twin)))
    with switch.chosen_here(chosen), switched_off(off), torch.no_grad():  # what is captured runs copies of layers
        twin.eval().forward(*args, **kwargs)
    return seen.inputs
