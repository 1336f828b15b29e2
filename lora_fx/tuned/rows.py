"""An adapter for each row of a batch: where the batch is in the inputs of layers is seen in two runs of the model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import attached_to
from lora_fx.adapters.rows import LAYOUTS, AdapterRows, Seen, are_alike, layouts_that_fit, tell_apart
from lora_fx.adapters.selection import Selection, Switch
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.errors import RefusedError
from lora_fx.models.wrappers import seen_through
from lora_fx.regions.survey import trial_twin
from lora_fx.tuned.switching import names_of, refuse_graph, refuse_unknown, switches_in

SEEN_CALLS = "lora_fx_row_calls"
"""Attribute of an adapted model: in which kinds of calls it was seen where the batch is in the inputs of its layers."""


@contextlib.contextmanager
def rows(tuned: nn.Module, adapters: Sequence[str | None]) -> Iterator[None]:
    """Return a context in which each row of a batch has an adapter of its own, in this thread: forward, training, all.

    Each row gives what it gives alone with its adapter, up to rounding; rows with None give what the base gives.  Which
    entries of a layer's input belong to which row is seen in the first call: two runs of the base, without gradients,
    on the call's inputs with their rows told apart, in the second moved on by one.  Further calls know it.

    Args:
        tuned: an adapted model, which stays unchanged; it is called as a whole.
        adapters: for each row of the batch a name, or None for the base.

    Raises:
        ValueError: a name that no site has.
        RefusedError: the inputs of a call have another number of rows, a layer's input does not show them, a weight is
            read by code, or modules are trained whole; before anything is computed with adapters.
    """
    tuned, names = seen_through(tuned), tuple(adapters)
    if isinstance(adapters, str) or not names:
        raise ValueError("adapters must be a sequence: a name, or None, for each row of the batch")
    refuse_graph(tuned)
    switches = switches_in(tuned)
    refuse_unknown([name for name in dict.fromkeys(names) if name is not None], names_of(switches))
    _refuse_whole(switches)
    chosen = Selection(rows=AdapterRows(names, tuned.__dict__.setdefault(SEEN_CALLS, set())))
    hook = tuned.register_forward_pre_hook(_looker(tuned, chosen, switches), with_kwargs=True, prepend=True)
    try:
        with contextlib.ExitStack() as stack:
            for switch in switches:
                stack.enter_context(switch.chosen_here(chosen))
            yield
    finally:
        hook.remove()


def _refuse_whole(switches: Sequence[Switch]) -> None:
    whole = [(name, "is trained whole") for switch in switches for name in switch.whole]
    if whole:
        raise RefusedError("parameters of the model itself are trained, and belong to every row", whole)


def _looker(tuned: nn.Module, chosen: Selection, switches: Sequence[Switch]) -> Callable[..., None]:
    """Return a hook that compares a call's inputs with the rows, and looks where they go if that is not known."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = chosen.rows
        if module is not tuned or rows is None or not any(switch.now() is chosen for switch in switches):
            return  # a call of a copy, or of another thread
        batch, given = len(rows.names), list(tensors_in((args, kwargs)))
        if given and not any(value.dim() and value.shape[0] == batch for value in given):
            shapes = [(f"input {number}", str(list(value.shape))) for number, value in enumerate(given)]
            raise RefusedError(
                f"adapters are given for {batch} rows, and no input has so many", shapes, "give one for each row"
            )
        kind = _kind_of(tuned, batch, args, kwargs, given)
        if batch > 1 and kind not in rows.seen_calls:
            _see(tuned, batch, args, kwargs)
            rows.seen_calls.add(kind)

    return look  # type: ignore[no-any-return]


def _kind_of(
    tuned: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
) -> tuple[object, ...]:
    """Return what calls have in common in which layers see the batch in the same places.

    Sizes do not count, but for those of 1, which hide an order, and whether it is the batch that comes first.
    """
    flags = [
        (name, value)
        for name, value in (*enumerate(args), *sorted(kwargs.items()))
        if value is None or isinstance(value, bool | int | float | str)
    ]
    tensors = [
        (value.is_floating_point(), [size == 1 for size in value.shape], value.shape[:1] == (batch,)) for value in given
    ]
    return (tuned.training, tuple(sorted(kwargs)), str(flags), str(tensors))


def _see(tuned: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note on adapted layers where the batch is in their inputs, in two runs of a copy of the base.

    Raises:
        RefusedError: naming every layer whose input does not show it.
    """
    wrong = []
    with trial_twin(tuned) as twin:
        before, after = (_inputs_of_a_run(twin, batch, args, kwargs, moved) for moved in (False, True))
        own = {copied: tuned.get_submodule(path) for path, copied in twin.named_modules()}
    for layer, calls in before.items():
        known = own[layer].__dict__.setdefault(LAYOUTS, {})
        again = after.get(layer, [])
        for (shape, one), (_, other) in zip(calls, again, strict=False):
            fits = list(layouts_that_fit(one, other, batch)) if len(calls) == len(again) else []
            if not fits and len(shape) in known and are_alike(one, batch):
                continue  # as of equal tokens, one each
            agreed = known.get(len(shape), fits[0]).agreed(fits[0]) if len(fits) == 1 else None
            if agreed is not None:
                known[len(shape)] = agreed
            else:
                known.pop(len(shape), None)
                wrong.append((next(iter(attached_to(layer))).spec.path, f"its input is {list(shape)}"))
                break
    if wrong:
        raise RefusedError(
            f"which part of these layers' inputs belongs to which of {batch} rows cannot be seen",
            list(dict.fromkeys(wrong)),
            "keep these sites out of the rules of what is used in `lora_fx.rows`, or run the rows one by one",
        )


def _inputs_of_a_run(
    twin: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], moved: bool
) -> dict[nn.Module, list[tuple[torch.Size, list[Tensor]]]]:
    """Return for each adapted layer, call by call, sums of its input for each entry of each dimension."""
    args, kwargs = copied((args, kwargs), lambda tensor: tensor.detach().clone())
    seen = Seen()
    with contextlib.ExitStack() as stack:
        for switch in switches_in(twin):
            stack.enter_context(switch.chosen_here(Selection(rows=AdapterRows((None,), seen=seen))))
        stack.enter_context(torch.no_grad())
        for tensor in tensors_in((args, kwargs)):
            if tensor.dim() and tensor.shape[0] == batch:
                tell_apart(tensor)
                tensor.copy_(tensor.roll(1, 0) if moved else tensor)
        twin.eval().forward(*args, **kwargs)
    return seen.inputs
