"""Where the batch is in the inputs of layers: seen in two runs of the model, between which its rows are moved on.

In the second run one row is another one besides, and the others must not hear of it: what mixes is no batch.  In two
more runs the tokens of each row are nearly one token: layers of which the entries are picked by values, as those of
single experts are, have then others.  In further runs some rows are others, so that for any two of them there is one in
which just the first is: no entry of the second may change by that.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import attached_to
from lora_fx.adapters.dicts import modules_beside
from lora_fx.adapters.rows import LAYOUTS, Layout, Unclear, are_alike, layouts_that_fit
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.errors import RefusedError
from lora_fx.regions.survey import trial_twin
from lora_fx.tuned.rowruns import Guess, Inputs, RowRuns

_Found = dict[nn.Module, dict[int, Layout]]
_Wrong = list[tuple[nn.Module, torch.Size]]
_MOST_GUESSES = 10
_LOOSE, _TIGHT, _FAINT = 0.05, 1e-3, 1e-5
"""How far a row may be from where it is expected, of how far rows are apart.

Tight where sizes could mean something else, as of as many tokens as rows, and nothing is in half precision; faint for
what a row may hear of others.
"""


def row_axis(tensor: Tensor, batch: int, dim: int) -> int | None:
    """Return the dimension of an input that is the batch, as its sizes tell; None if there is none."""
    return next(iter(_axes(tensor, batch, dim)), None)


def _axes(tensor: Tensor, batch: int, dim: int) -> list[int]:
    """Return the dimensions of an input that may be the batch, the likeliest first: masks have it first anywhere."""
    return [axis for axis in dict.fromkeys((dim, 0)) if axis < tensor.dim() and tensor.shape[axis] == batch]


def look_for_rows(
    model: nn.Module, names: Sequence[str | None], dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Unclear:
    """Note on adapted layers where the batch is in their inputs, in runs of a copy of the base.

    Returns:
        The layers of other adapters than those named whose input does not show it.

    Raises:
        RefusedError: naming every layer with one of these adapters whose input does not show it.
    """
    batch, given = len(names), list(tensors_in((args, kwargs)))
    is_square = any(value.shape[:2] == (batch, batch) for value in given)
    tolerance = _TIGHT if is_square and _is_exact(model) else _LOOSE
    first: tuple[_Wrong, Unclear] | None = None
    for guess in itertools.islice(_guesses(given, batch, dim), _MOST_GUESSES):
        found, wrong = _seen(model, batch, args, kwargs, guess, tolerance, names)
        unclear = _by_adapter(wrong)
        if not unclear.keys() & names:
            for layer, layouts in found.items():
                layer.__dict__.setdefault(LAYOUTS, {}).update(layouts)
            _forget(wrong)
            return unclear
        first = first or (wrong, unclear)
    if first is not None:
        _forget(first[0])
        refuse_unclear(first[1], names)
    return {}


def refuse_unclear(unclear: Unclear, names: Sequence[str | None]) -> None:
    """Raise RefusedError where it is unclear for one of these adapters which part of a layer's input is whose."""
    facts = [fact for name in dict.fromkeys(names) if name is not None for fact in unclear.get(name, ())]
    if facts:
        raise RefusedError(
            f"which part of these layers' inputs belongs to which of {len(names)} rows cannot be seen",
            list(dict.fromkeys(facts)),
            "keep these sites out of the rules of what is used in `lora_fx.rows`, or run the rows one by one",
        )


def _by_adapter(wrong: _Wrong) -> Unclear:
    unclear: Unclear = {}
    for layer, shape in wrong:
        for one in attached_to(layer):
            unclear.setdefault(one.spec.adapter, []).append((one.spec.path, f"its input is {list(shape)}"))
    return unclear


def _forget(wrong: _Wrong) -> None:
    for layer, shape in wrong:
        layer.__dict__.get(LAYOUTS, {}).pop(len(shape), None)


def _is_exact(model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled()


def _guesses(given: Sequence[Tensor], batch: int, dim: int) -> Iterator[Guess]:
    """Yield where the batch may be in the inputs, the likeliest first: in each that has its size, where it may be.

    What has that size by chance (positions of as many tokens as there are rows) has it not, or elsewhere.
    """
    options: list[list[int | None]] = [[*_axes(value, batch, dim), None] for value in given]
    likely = tuple(places[0] for places in options)
    yield likely
    by_chance = [
        number
        for number, value in enumerate(given)
        if len(options[number]) > 1 and (value.dim() == 1 or value.shape[:2] == (batch, batch))
    ]
    by_chance.sort(key=lambda number: given[number].dim())
    for size in (1, 2):
        for numbers in itertools.combinations(by_chance, size):
            for places in itertools.product(*(options[number][1:] for number in numbers)):
                changed = dict(zip(numbers, places, strict=True))
                guess = tuple(changed.get(number, place) for number, place in enumerate(likely))
                if any(place is not None for place in guess):
                    yield guess


def _seen(
    model: nn.Module,
    batch: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guess: Guess,
    tolerance: float,
    names: Sequence[str | None],
) -> tuple[_Found, _Wrong]:
    """Return where layers see the batch if the inputs have it where it is guessed, and the layers that do not show it.

    What was seen before of a layer counts.
    """
    with trial_twin(model) as twin:
        own = {copied: model.get_submodule(path) for path, copied in modules_beside(twin)}
        runs = RowRuns(twin, batch, guess, args, kwargs)
        before, after = runs.first(), runs.inputs(moved=True)
        first, second = (runs.inputs(moved, alike_inside=True) for moved in (False, True))
        known = {layer: dict(own[layer].__dict__.get(LAYOUTS, {})) for layer in before}
        wrong = _compared(before, after, batch, tolerance, known)
        for layer in _picked_by_values(before, first, second, batch, tolerance, known):
            wrong.setdefault(layer, next(shape for shape, _ in before.get(layer) or first.get(layer) or second[layer]))
        wrong = runs.picked | wrong
        for layer, shape in runs.hearing(known, _FAINT if _is_exact(model) else tolerance) if not wrong else ():
            wrong.setdefault(layer, shape)
    return {own[layer]: layouts for layer, layouts in known.items()}, [
        (own[one], shape) for one, shape in wrong.items()
    ]


def _compared(
    before: Inputs, after: Inputs, batch: int, tolerance: float, known: _Found
) -> dict[nn.Module, torch.Size]:
    """Note where layers see the batch, in place of what is known, and return those that do not show it."""
    wrong: dict[nn.Module, torch.Size] = {}
    for layer, calls in before.items():
        again = after.get(layer, [])
        for (shape, one), (_, other) in zip(calls, again, strict=False):
            fits = list(layouts_that_fit(one, other, batch, tolerance)) if len(calls) == len(again) else []
            if not fits and len(shape) in known[layer] and are_alike(one, batch):
                continue  # as of equal tokens, one each
            agreed = known[layer].get(len(shape), fits[0]).agreed(fits[0]) if len(fits) == 1 else None
            if agreed is None:
                wrong[layer] = shape
                break
            known[layer][len(shape)] = agreed
    return wrong


def _picked_by_values(
    plain: Inputs, before: Inputs, after: Inputs, batch: int, tolerance: float, known: _Found
) -> Iterator[nn.Module]:
    """Yield the layers that have other entries, or the batch elsewhere, where the values of rows are others."""
    for layer in dict.fromkeys((*plain, *before)):
        calls, given, moved = (inputs.get(layer, []) for inputs in (plain, before, after))
        shapes = [[shape for shape, _ in inputs] for inputs in (calls, given, moved)]
        if (
            shapes[0] != shapes[1]
            or shapes[1] != shapes[2]
            or not all(
                are_alike(one, batch)
                or (layout := known.get(layer, {}).get(len(shape))) is None
                or any(layout.agreed(fit) for fit in layouts_that_fit(one, other, batch, tolerance))
                for (shape, one), (_, other) in zip(given, moved, strict=True)
            )
        ):
            yield layer
