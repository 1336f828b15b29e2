"""A call of a frozen block: answered by what is kept, put off until it is known whether it must be made, or made.

The first block of a chain knows from the digest of its call whether there is an output of the last one.  If there is,
no block computes until the last one has seen that all of its own arguments are what they were; whoever reads a tensor
in between gets it computed.  If there is none, all blocks compute at once as they do without any of this, and the last
one keeps its output.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_fx.capture.calls.ambient import ambient_state
from lora_fx.liveness.rows import LazyRows, lazy, whole
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.checking import ModuleCall
from lora_fx.regions.prefix.code import Independence
from lora_fx.regions.prefix.digests import NoDigest, digest
from lora_fx.regions.prefix.entries import Entry
from lora_fx.regions.prefix.links import ChainRun, Link, Waiting, form_of, only_tensor, tie, whole_call
from lora_fx.regions.prefix.meeting import Meeting, Watch, around, devices_of, met
from lora_fx.regions.prefix.rows import Arguments, rows_of
from lora_fx.regions.prefix.state import BlockState, Kept


def answer(state: BlockState, kept: Kept, call: ModuleCall) -> object:
    """Return what a call of a block gives."""
    call = _without_computed(call)
    reason = around(state, call)
    if reason:
        kept.bypass(reason)
        return call.by_forward()
    meeting = met(state, call)
    if isinstance(meeting, str):
        return _learnt(state, kept, whole_call(call))
    form = meeting.code.forms.get(meeting.shapes)
    if form is None:
        return _made(state, kept, meeting)
    try:
        run = meeting.link.run if meeting.link is not None else _started(kept, meeting, form.shape[0])
        keys = meeting.keys(run, form.shape[0])
    except NoDigest as why:
        kept.bypass(str(why))
        return call.by_forward()
    if run.computes:
        return _made(state, kept, meeting, run, keys)
    source = Waiting(kept, call, meeting.code, form, meeting.shapes, ambient_state(devices_of(call)))
    if state.last:
        return _ended(kept, meeting, run, keys, source)
    source.link = Link(run, keys, 0)
    run.waiting.append(source)
    return form.of(lazy(source))


def _without_computed(call: ModuleCall) -> ModuleCall:
    """Return a call with plain tensors in the place of those that somebody has asked for since they were put off."""

    def plain(value: LazyRows) -> Tensor:
        return whole(value) if value.lazy_value.is_whole else value

    args, kwargs = pytree.tree_map_only(LazyRows, plain, (call.args, call.kwargs))
    return ModuleCall(call.module, call.forward, args, kwargs)


def _started(kept: Kept, meeting: Meeting, batch: int) -> ChainRun:
    """Return a run that starts with a call: with what is kept of all its rows, if there is anything."""
    run = ChainRun([])
    run.firsts = meeting.keys(run, batch)
    get = kept.entries.get
    found = [get(alone) for alone, _ in run.places()]
    if None in found:
        others = [entry or get(apart) for entry, (_, apart) in zip(found, run.places(), strict=True)]
        found = found if None in others else others
    run.entries = found if any(found) else []
    run.whole = None if run.entries else get(run.place_of_all())
    return run


def _learnt(state: BlockState, kept: Kept, call: ModuleCall) -> object:
    """Make a call that no graph fits; if one has been captured or proven on it, its output may be kept."""
    watch = Watch(call)
    result = call.by_forward()
    reason, meeting = watch.reason(), met(state, call)
    if reason or isinstance(meeting, str):
        kept.bypass(reason or str(meeting))
        return result
    return _noted(state, kept, meeting, result)


def _made(
    state: BlockState, kept: Kept, meeting: Meeting, run: ChainRun | None = None, keys: list[bytes] | None = None
) -> object:
    """Make a call, and note what made its result."""
    call = meeting.call = whole_call(meeting.call)
    watch = Watch(call)
    result = call.by_forward()
    reason = watch.reason()
    if reason:
        if watch.drew:
            meeting.code.draws.add(meeting.modes)
        kept.bypass(reason)
        return result
    return _noted(state, kept, meeting, result, run, keys)


def _noted(
    state: BlockState,
    kept: Kept,
    meeting: Meeting,
    result: object,
    run: ChainRun | None = None,
    keys: list[bytes] | None = None,
) -> object:
    """Return a result that knows what made it; of the last block it is kept."""
    form = form_of(result)
    if form is None:
        kept.bypass("it returns more than one tensor, or no contiguous one")
        return result
    value = only_tensor(result)
    meeting.code.forms[meeting.shapes] = form
    if run is None or keys is None:
        linked = meeting.link is not None and meeting.link.run.computes
        run = meeting.link.run if linked and meeting.link is not None else ChainRun([])
        try:
            keys = meeting.keys(run, len(value))
        except NoDigest as why:
            kept.bypass(str(why))
            return result
        run.firsts = run.firsts or keys
    _judge(meeting, run, keys, value)
    if state.last:
        _keep(kept, run, keys, value)
    else:
        tie(value, Link(run, keys, value._version))
    return result


def _judge(meeting: Meeting, run: ChainRun, keys: list[bytes], value: Tensor) -> None:
    """Note in a run whether a block keeps the rows of this batch apart."""
    call, code = meeting.call, meeting.code
    if meeting.shapes in code.apart:
        rows = code.apart[meeting.shapes]
    elif code.sizes_of_data or _is_too_alike(keys):
        rows = Independence(False, False)
    else:
        rows = rows_of(_by_forward(call), (call.args, call.kwargs), value, ambient_state(devices_of(call)))
        code.apart[meeting.shapes] = rows
    run.apart, run.alone = run.apart and rows.apart, run.alone and rows.alone


def _is_too_alike(keys: list[bytes]) -> bool:
    """Whether a batch is one in which rows that depend on each other would not show it."""
    return len(keys) > 1 and keys[0] == keys[-1]


def _by_forward(call: ModuleCall) -> Callable[[Arguments], Tensor]:
    """Return a function that makes a call with other arguments."""

    def run(arguments: Arguments) -> Tensor:
        args, kwargs = arguments
        return only_tensor(call.forward(*args, **kwargs)).detach()

    return run


def _keep(kept: Kept, run: ChainRun, keys: list[bytes], value: Tensor) -> None:
    """Keep the output of the last block: its rows, if they are apart in all blocks, or else the whole."""
    rows = value.detach()
    if run.apart:
        places = [alone if run.alone else apart for alone, apart in run.places()]
        for place, key, row in zip(places, keys, rows, strict=True):
            kept.entries.put(place, Entry(key, _own(row)))
    else:
        kept.entries.put(run.place_of_all(), Entry(digest(*keys), _own(rows)))
    kept.count(misses=len(rows), by_rows=run.apart)


def _own(value: Tensor) -> Tensor:
    """Return a copy in the memory of the processor."""
    return value.to("cpu", copy=True).contiguous()


def _ended(kept: Kept, meeting: Meeting, run: ChainRun, keys: list[bytes], source: Waiting) -> object:
    """Return the output of the last block: of what is kept, where all calls are what they were; the rest is made."""
    form, batch = meeting.code.forms[meeting.shapes], len(keys)
    if run.whole is not None and run.whole.end == digest(*keys):
        kept.count(hits=batch)
        return form.of(run.whole.value.to(source.device, copy=True))
    missing = [row for row, entry in enumerate(run.entries) if entry is None or entry.end != keys[row]]
    if run.whole is not None or len(missing) == batch:
        return _all_made(kept, meeting, run, keys)
    value = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    if missing:
        made = _some_made(run, source, keys, missing)
        if made is None:
            return _all_made(kept, meeting, run, keys)
        for row, one in zip(missing, made.detach(), strict=True):
            kept.entries.put(run.places()[row][0], Entry(keys[row], _own(one)))
        value[missing] = made.detach()
    for row, entry in enumerate(run.entries):
        if row not in missing and entry is not None:
            value[row].copy_(entry.value)
    kept.count(hits=batch - len(missing), misses=len(missing), by_rows=True)
    return form.of(value)


def _some_made(run: ChainRun, last: Waiting, keys: list[bytes], missing: list[int]) -> Tensor | None:
    """Return rows of the last block's output, made alone; None where they might not be what they are among others."""
    index, made, value = torch.tensor(missing), dict[int, Tensor](), None
    for source in (*run.waiting, last):
        code, sizes = source.code, tuple(_resized(shape, len(keys), len(missing)) for shape in source.shapes)
        if not code.apart.get(source.shapes, Independence(False, False)).alone:
            return None
        arguments = source.arguments(len(keys), index, made)
        value = made[id(source)] = _by_forward(source.call)(arguments)
        if len(missing) > 1 and sizes not in code.apart:
            if _is_too_alike([keys[row] for row in missing]):
                return None
            code.apart[sizes] = rows_of(_by_forward(source.call), arguments, value, source.ambient)
        if len(missing) > 1 and not code.apart[sizes].alone:
            return None
    return value


def _resized(shape: object, batch: int, rows: int) -> object:
    if not isinstance(shape, tuple) or not shape[0] or shape[0][0] != batch:
        return shape
    return torch.Size((rows, *shape[0][1:])), shape[1]


def _all_made(kept: Kept, meeting: Meeting, run: ChainRun, keys: list[bytes]) -> object:
    """Make all calls of a run that had been put off, and keep what comes of it."""
    for source in run.waiting:
        rows = source.code.apart.get(source.shapes, Independence(False, False))
        run.apart, run.alone = run.apart and rows.apart, run.alone and rows.alone
    call = meeting.call = whole_call(meeting.call)
    result = call.by_forward()
    value = only_tensor(result)
    _judge(meeting, run, keys, value)
    _keep(kept, run, keys, value)
    return result
