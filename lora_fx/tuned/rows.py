"""An adapter for each row of a batch: the context, and the look at a call of the model before its adapters compute."""

import contextlib
import operator
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached, shown_parameters
from lora_fx.adapters.rows import LOOKS, AdapterRows, Unclear
from lora_fx.adapters.selection import Selection, Switch, rows_here
from lora_fx.adapters.stacked import kept_for
from lora_fx.adapters.tokens import OFFSETS
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.errors import RefusedError
from lora_fx.models.wrappers import seen_through
from lora_fx.rules.given import is_whole
from lora_fx.tuned.asking import ask_layers
from lora_fx.tuned.calls import kind_of
from lora_fx.tuned.rowlayouts import look_for_rows, refuse_unclear, row_axis
from lora_fx.tuned.switching import names_of, refuse_unknown, switches_in

KNOWN = "lora_fx_rows"
"""Attribute of an adapted model: what is known of its rows, a KnownRows."""


@dataclass(slots=True, eq=False)
class KnownRows:
    """What is known of the rows of a model, as long as it has the adapters that it had then."""

    names: tuple[tuple[str, ...], ...]
    """Those of its switches: other objects as soon as an adapter is added, dropped or renamed."""
    read: dict[str, list[str]] = field(default_factory=dict)
    """Of each adapter: the sites whose weights code reads, so that one serves every row."""
    seen_calls: dict[Any, Unclear] = field(default_factory=dict)
    """In which kinds of calls it was seen where the batch is in the inputs of layers."""


@contextlib.contextmanager
def rows(tuned: nn.Module, adapters: Sequence[str | None], *, dim: int = 0) -> Iterator[None]:
    """Return a context in which each row of a batch has an adapter of its own, in this thread: forward, training, all.

    Each row gives what it gives alone with its adapter, up to rounding; rows with None give what the base gives.  Which
    entries of a layer's input belong to which row is seen in the first call: two runs of the base, without gradients,
    on the call's inputs with their rows told apart, in the second moved on by one; two more with rows of nearly one
    token each, in which layers differ whose entries are picked by values; and 2 ⌈log₂ rows⌉ in which some rows are
    others, and the entries of the rest must not change.  Further calls know it.

    Args:
        tuned: an adapted model, which stays unchanged; it is called as a whole, or its encoder as `generate` calls it.
        adapters: for each row of the batch a name, or None for the base.
        dim: the dimension of the model's inputs that is the batch; 1 for models with `batch_first=False`.

    Raises:
        ValueError: a name that no site has, or another dimension than 0 and 1.
        RefusedError: code reads a weight that one of the names adapts, as of banks of experts, or modules are trained
            whole; and at a call, before anything is computed with adapters: its inputs have another number of rows, a
            layer's input does not show them or has entries that values have picked, or rows hear of each other.
    """
    tuned, names = seen_through(tuned), _names(adapters)
    if not is_whole(dim, 0, 1):
        raise ValueError(f"dim is {dim!r}; the batch is dimension 0 or 1 of the inputs")
    switches = switches_in(tuned)
    refuse_unknown([name for name in names if name is not None], names_of(switches))
    _refuse_whole(switches)
    known = _known_rows(tuned, switches)
    _refuse_read(known, names)
    ask_layers(tuned)
    parts = (tuned, *_called_alone(tuned))
    chosen = Selection(rows=AdapterRows(names, known.seen_calls, kept=kept_for(tuned, names), models=parts, dim=dim))
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(_looked_at(part, part is not tuned))
        for switch in switches:
            stack.enter_context(switch.chosen_here(chosen))
        yield


def _names(adapters: object) -> tuple[str | None, ...]:
    names: tuple[str | None, ...] = ()
    if isinstance(adapters, Iterable) and not isinstance(adapters, (str, bytes, Mapping, set, frozenset)):
        names = tuple(adapters)
    if not names:
        wanted = "a name, or None, for each row of the batch"
        raise ValueError(f"adapters must be a sequence: {wanted}; found {type(adapters).__name__}")
    return names


def _refuse_whole(switches: Sequence[Switch]) -> None:
    whole = [(name, "is trained whole") for switch in switches for name in switch.whole]
    if whole:
        raise RefusedError("parameters of the model itself are trained, and belong to every row", whole)


def _known_rows(tuned: nn.Module, switches: Sequence[Switch]) -> KnownRows:
    known: KnownRows | None = tuned.__dict__.get(KNOWN)
    names = tuple(switch.names for switch in switches)
    if known is not None and len(known.names) == len(names) and all(map(operator.is_, known.names, names)):
        return known
    known = tuned.__dict__[KNOWN] = KnownRows(names)
    for path, one in all_attached(tuned):
        if shown_parameters(one.owner):
            known.read.setdefault(one.spec.adapter, []).append(path)
    return known


def _refuse_read(known: KnownRows, names: Sequence[str | None]) -> None:
    facts = [
        (path, f"'{name}' is used for some rows")
        for name in dict.fromkeys(names)
        if name is not None
        for path in known.read.get(name, ())
    ]
    if facts:
        raise RefusedError(
            "code reads an adapted weight itself, and cannot use another one for each row",
            facts,
            "keep these sites out of the rules of what is used in `lora_fx.rows`",
        )


def _called_alone(tuned: nn.Module) -> tuple[nn.Module, ...]:
    """Return the parts that others call by themselves: transformers' `generate` calls the encoder of a model."""
    asked, config = getattr(tuned, "get_encoder", None), getattr(tuned, "config", None)
    if not callable(asked) or not getattr(config, "is_encoder_decoder", False):
        return ()
    found = asked()
    return tuple(one for one in tuned.modules() if one is found and one is not tuned)


@contextlib.contextmanager
def _looked_at(model: nn.Module, is_part: bool) -> Iterator[None]:
    """Let the calls of a model be looked at for a while; of a part of one also where they fail."""
    hooks = [
        model.register_forward_pre_hook(look, with_kwargs=True, prepend=True),
        model.register_forward_hook(looked, always_call=is_part),
    ]
    with _COUNTING:
        _OPEN[id(model)] += 1
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        with _COUNTING:
            _OPEN[id(model)] -= 1
            if not _OPEN[id(model)]:
                del _OPEN[id(model)]


_OPEN: Counter[int] = Counter()
"""The models whose calls are looked at, by their id, and how many contexts want that."""
_COUNTING = threading.Lock()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Compare a call's inputs with the rows, and look where they go if that is not known: the hook of every model.

    One function for all contexts: compiled code that has it in it serves the next one too, and copies of a model can be
    pickled; there it takes itself off.
    """
    if kwargs is None:  # another thread's hook, which was taken off in between: torch gives it no keywords then
        return
    if id(module) not in _OPEN:
        _take_off(module)
        return
    rows = next((rows for rows in rows_here() if any(module is one for one in rows.models)), None)
    if rows is None:
        return
    kwargs = {name: value for name, value in kwargs.items() if name != OFFSETS}
    prompts = _of_prompts(rows, module, args, kwargs)
    _look_for(prompts or rows, module, args, kwargs)
    if prompts is not None:
        stack = contextlib.ExitStack()
        for switch in switches_in(rows.models[0]):
            stack.enter_context(switch.chosen_here(Selection(rows=prompts)))
        prompts.leave = stack.close


def _of_prompts(
    rows: AdapterRows, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AdapterRows | None:
    """Return the adapters of prompts that an encoder is given before `generate` makes several rows of each.

    None if the call is of all rows, or nothing tells which of them belong to one prompt.
    """
    sizes = {value.shape[0] for value in tensors_in((args, kwargs)) if value.dim() > 1}
    if module is rows.models[0] or len(sizes) != 1:
        return None
    each, rest = divmod(len(rows.names), max(1, *sizes))
    names = rows.names[:: max(1, each)]
    if rest or each < 2 or rows.names != tuple(name for name in names for _ in range(each)):
        return None
    kept = kept_for(rows.models[0], names)
    return AdapterRows(names, rows.seen_calls, kept=kept, models=rows.models, dim=rows.dim)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def looked(module: nn.Module, _args: Any, _result: Any) -> None:
    """Note that a call that was looked at has ended."""
    for rows in list(rows_here()):
        rows.inside.discard(id(module))
        if rows.leave is not None and any(module is one for one in rows.models[1:]):
            rows.leave()


for _hook in (look, looked):
    setattr(_hook, LOOKS, True)


def _take_off(module: nn.Module) -> None:
    tables: tuple[dict[int, object], ...] = (module._forward_pre_hooks, module._forward_hooks)  # type: ignore[assignment]
    for table in tables:
        for number, hook in list(table.items()):
            if getattr(hook, LOOKS, False):
                del table[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_always_called.pop(number, None)


def _look_for(rows: AdapterRows, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    rows.begin_call()
    rows.inside.add(id(module))
    batch, given = len(rows.names), list(tensors_in((args, kwargs)))
    _refuse_other_numbers(module, rows, given, args, kwargs)
    kind = _kind_of(module, rows, args, kwargs, given)
    if batch > 1 and kind not in rows.seen_calls:
        rows.seen_calls[kind] = look_for_rows(module, rows.names, rows.dim, args, kwargs)
    refuse_unclear(rows.seen_calls.get(kind, {}), rows.names)


def _refuse_other_numbers(
    module: nn.Module, rows: AdapterRows, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise RefusedError where no input has as many rows as there are names, or, of one name, the first has not."""
    batch = len(rows.names)
    asked = given if batch > 1 else _first_input(module, given, args, kwargs)
    if asked and all(row_axis(value, batch, rows.dim) is None for value in asked):
        shapes = [(f"input {number}", str(list(value.shape))) for number, value in enumerate(given)]
        advice = "give one for each row; `generate` makes num_beams or num_return_sequences of each prompt"
        raise RefusedError(f"adapters are given for {batch} rows, and no input has so many", shapes, advice)


def _first_input(
    module: nn.Module, given: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sequence[Tensor]:
    """Return what a model is a function of: others may have one row for all, as positions have."""
    main = kwargs.get(str(getattr(module, "main_input_name", "")))
    if isinstance(main, Tensor):
        return [main]
    first = next((value for value in args if isinstance(value, Tensor) and value.dim() > 1), None)
    return given if first is None else [first]


def _kind_of(
    module: nn.Module, rows: AdapterRows, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
) -> tuple[object, ...]:
    """Return what calls have in common in which layers see the batch in the same places.

    Models pack tokens where a mask says that there is padding, and only there.
    """
    which = next(number for number, model in enumerate(rows.models) if model is module)
    masks = [value for name, value in kwargs.items() if "mask" in name and isinstance(value, Tensor)]
    padded = tuple(not bool(mask.all()) for mask in masks if mask.dim() == 2 and not mask.is_floating_point())
    return (which, rows.dim, padded, *kind_of(module, len(rows.names), args, kwargs, given))
