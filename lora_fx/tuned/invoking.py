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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import SWITCH, attached_to
from lora_fx.adapters.selection import Selection, Switch, acts_everywhere, switched_off
from lora_fx.adapters.tokens import EVERYWHERE, OFFSETS, Tokens, TokensSeen, begun_unseen, last_occurrences
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.errors import RefusedError
from lora_fx.liveness.heads import late_modules
from lora_fx.models.swap import swap
from lora_fx.regions.install import regions
from lora_fx.regions.survey import trial_twin
from lora_fx.tuned.caches import UNKNOWN, CacheNote, Tensors, cache_in, note_of, refuse_bare, write_note
from lora_fx.tuned.calls import kind_of, seen_in
from lora_fx.tuned.prompting import Generates, Prompt, are_embeddings, are_ids, prompt_of, starts_given, without_ids

SEEN_CALLS = "lora_fx_token_calls"
"""Attribute of an adapted model: in which kinds of calls its layers were seen to have the tokens in their order."""


def find_invocations(tuned: nn.Module) -> None:
    """Let an adapted model find the invocations of its adapters in each of its calls, in place, if it has any."""
    if not tuned.__dict__[SWITCH].invocations or begin_call in tuned._forward_pre_hooks.values():
        return
    tuned.register_forward_pre_hook(begin_call, with_kwargs=True)
    tuned.register_forward_hook(end_call, with_kwargs=True, always_call=True)
    if callable(getattr(tuned, "generate", None)):
        swap(tuned, Generates)


@dataclass(slots=True)
class _Invoked:
    """A call that runs."""

    model: nn.Module
    around: contextlib.ExitStack
    stream: Tensor | None = None
    """The ids of its tokens, or their embeddings where somebody says where adapters act."""
    cache: Any = None
    state: Tensors | None = None
    """What the cache had when the call began."""
    before: CacheNote | None = None
    """What the cache carried when the call began."""
    tokens: Tokens | None = None


class _Running(threading.local):
    """The calls that run in a thread, each inside of the one before it."""

    def __init__(self) -> None:
        self.calls: list[_Invoked] = []


_RUNNING = _Running()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin_call(tuned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let this thread use adapters with an invocation from it on, until the call of the model ends.

    Offsets that the caller gives are taken out of the arguments.
    """
    call = _Invoked(tuned, contextlib.ExitStack())
    _RUNNING.calls.append(call)
    switch: Switch = tuned.__dict__[SWITCH]
    if not switch.invocations:
        return None
    offsets = kwargs.get(OFFSETS)
    given = {name: value for name, value in kwargs.items() if name != OFFSETS}
    selection = switch.now()
    if acts_everywhere():
        call.around.enter_context(switch.chosen_here(replace(selection, tokens=EVERYWHERE)))
    else:
        _begin(call, switch, selection, offsets, args, given)
    return (args, given) if OFFSETS in kwargs else None


def _begin(
    call: _Invoked,
    switch: Switch,
    selection: Selection,
    offsets: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Find on which tokens of a call adapters act, and let them act there."""
    used = [name for name in selection.names if name in switch.invocations]
    if used and getattr(call.model, "_is_replica", False):
        facts = [(f"'{name}'", "acts from its invocation on") for name in used]
        raise RefusedError("replicas of nn.DataParallel do not find invocations", facts, "use DistributedDataParallel")
    named = _by_name(call.model, args, kwargs)
    prompt = prompt_of(switch) if offsets is None else None
    call.stream, call.cache = _stream_in(named, args), cache_in(named.values())
    if call.stream is None or (prompt is None and offsets is None and not are_ids(call.stream)):
        if used:
            raise without_ids(switch, used)
        call.stream = None
        return
    call.state = None if call.cache is None else Tensors(call.cache)
    is_told = prompt is not None or offsets is not None
    asking = {name: switch.invocations[name] for name in used if not is_told}
    call.before = note_of(call.cache, len(call.stream), asking)
    call.tokens = _tokens_of(switch, prompt, offsets, call, named, bool(used))
    if used:
        _refuse_packed(named)
        if not is_told:
            refuse_bare(named.values())
        _look(call.model, call, named, args, kwargs)
        call.around.enter_context(switch.chosen_here(replace(selection, tokens=call.tokens)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def end_call(tuned: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """End what `begin_call` has begun, and note on the KV cache in which rows adapters act."""
    if not _RUNNING.calls or _RUNNING.calls[-1].model is not tuned:
        return
    call = _RUNNING.calls.pop()
    call.around.close()
    if call.stream is None or call.tokens is None or result is None:  # None: the call has failed
        return
    made, given = cache_in(_values_of(result)), cache_in((*args, *kwargs.values()))
    cache = given if made is None else made  # a model may make another one at each call, and leave the given one
    if cache is None or (made is None and call.state is not None and call.state.are_those_of(cache)):
        return
    stream = call.stream
    ids = stream if are_ids(stream) else torch.full(stream.shape[:2], UNKNOWN, device=stream.device)
    write_note(cache, call.before, call.tokens, ids, tuned.__dict__[SWITCH].invocations)


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


def _stream_in(named: Mapping[str, Any], args: tuple[Any, ...]) -> Tensor | None:
    """Return the ids of a call's tokens, what is called so or what comes first; else their embeddings."""
    given = (named.get("input_ids"), *args[:1])
    ids = next((value for value in given if are_ids(value)), None)
    embeddings = named.get("inputs_embeds")
    return embeddings if ids is None and are_embeddings(embeddings) else ids


def _tokens_of(
    switch: Switch, prompt: Prompt | None, offsets: object, call: _Invoked, named: Mapping[str, Any], refuses: bool
) -> Tokens:
    """Return on which tokens of a call each adapter with an invocation acts."""
    stream, note = call.stream, call.before
    assert stream is not None
    batch, length = stream.shape[:2]
    kept = named.get("logits_to_keep", 0)
    kept = min(kept, length) if isinstance(kept, int) else 0
    if prompt is not None:
        return Tokens(prompt.starts_in(stream, call.cache), batch, length, kept)
    if offsets is not None:
        return Tokens(starts_given(switch, offsets, batch, length), batch, length, kept)
    before = stream[:, :0] if note is None else note.last.to(stream.device, stream.dtype)
    known = torch.cat((before, stream), 1)
    starts, unseen = {}, list[str]()
    for name, tokens in switch.invocations.items():
        start = last_occurrences(known, tokens, named.get("attention_mask")) - before.shape[1]
        if note is not None and tokens in note.acts:
            acts = note.acts[tokens].to(stream.device)
            start = torch.where((start > length) & acts, 0, start)
            if bool((begun_unseen(known, tokens, before.shape[1], UNKNOWN) & ~acts & (start > length)).any()):
                unseen.append(name)
        starts[name] = start
    if unseen and refuses:
        facts = [(f"'{name}'", f"has the invocation {list(switch.invocations[name])}") for name in unseen]
        advice = f"say with `{OFFSETS}` where adapters act"
        what = "an invocation may have begun in tokens that the model has not seen (embeddings, a cache of others)"
        raise RefusedError(what, facts, advice)
    return Tokens(starts, batch, length, kept)


# -- that layers see the tokens in their order


def _look(
    tuned: nn.Module, call: _Invoked, named: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """See whether adapted layers have the tokens of a call in the order of its ids, unless that is known.

    In a second run of the base each row has other ids, or embeddings, from some place of its own on: just these entries
    of a layer's input must change.

    Raises:
        RefusedError: naming each layer whose input does not show the tokens so.
    """
    stream, tokens = call.stream, call.tokens
    assert stream is not None
    assert tokens is not None
    batch, length = stream.shape[:2]
    if batch * length == 1:
        return
    seen_calls = seen_in(tuned, SEEN_CALLS, [tuned.__dict__[SWITCH]])
    kind = kind_of(tuned, batch, args, kwargs, list(tensors_in((args, kwargs))))
    if kind in seen_calls:
        return
    rows = torch.arange(batch, device=stream.device)
    cuts = (length // 2 + rows) % length if length > 1 else rows % 2
    changes = torch.arange(length, device=stream.device) >= cuts.unsqueeze(1)
    others = _with_others(stream, changes)
    real = _not_padding(named.get("attention_mask"), changes)
    with trial_twin(tuned) as twin:
        before, after = (_inputs_of_a_run(twin, stream, given, args, kwargs) for given in (stream, others))
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
            f"these layers do not see the tokens of the call, {[batch, length]}, each where it stands and after those "
            "before it",
            wrong,
            "keep these sites out of the rules of an adapter with an invocation",
        )
    seen_calls.add(kind)


def _with_others(stream: Tensor, changes: Tensor) -> Tensor:
    """Return ids or embeddings of tokens, other ones at some places."""
    if not stream.is_floating_point():
        return torch.where(changes, torch.where(stream > 0, stream - 1, stream + 1), stream)
    noise = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0)).to(stream)
    noise *= stream.detach().float().std(correction=0).clamp(min=1e-3).to(stream)
    return torch.where(changes.unsqueeze(-1), stream.detach() + noise, stream.detach())


def _not_padding(mask: Any, tokens: Tensor) -> Tensor:
    """Return which tokens are no padding, [batch, tokens]: what layers see of that is nobody's affair."""
    length = tokens.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == len(tokens) and mask.shape[1] >= length:
        return mask[:, -length:].to(tokens.device) != 0
    return torch.ones_like(tokens, dtype=torch.bool)


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
    twin: nn.Module, stream: Tensor, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, list[tuple[torch.Size, Tensor]]]:
    """Return for each layer with such an adapter, call by call, sums over the features of each token."""
    args, kwargs = copied((args, kwargs), lambda tensor: (given if tensor is stream else tensor).detach().clone())
    switch: Switch = twin.__dict__[SWITCH]
    seen = TokensSeen()
    chosen = replace(Selection.of(switch.invocations), tokens=Tokens(seen=seen))
    off = (*(region for _, _, region in regions(twin)), *(state for _, state in late_modules(twin)))
    with switch.chosen_here(chosen), switched_off(off), torch.no_grad():  # what is captured runs copies of layers
        twin.eval().forward(*args, **kwargs)
    return seen.inputs
