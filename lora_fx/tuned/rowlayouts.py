"""Where the batch is in the inputs of layers: seen in two runs of the model, between which its rows are moved on.

In the second run one row is another one besides, and the others must not hear of it: what mixes is no batch.  In two
more runs the tokens of each row are nearly one token: layers of which the entries are picked by values, as those of
single experts are, have then others.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import attached_to
from lora_fx.adapters.rows import (
    LAYOUTS,
    AdapterRows,
    Layout,
    Seen,
    are_alike,
    change,
    layouts_that_fit,
    nearly_one_token,
    tell_apart,
)
from lora_fx.adapters.selection import Selection
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.errors import RefusedError
from lora_fx.regions.survey import trial_twin
from lora_fx.tuned.switching import switches_in

_Guess = tuple[int | None, ...]
"""For each tensor of a call the dimension that is the batch; None for what all rows share."""
_Found = dict[nn.Module, dict[int, Layout]]
_Wrong = list[tuple[nn.Module, torch.Size]]
_MOST_GUESSES = 10
_LOOSE, _TIGHT = 0.05, 1e-3
"""How far a row may be from where it is expected, of how far rows are apart.

Tight where sizes could mean something else, as of as many tokens as rows, and nothing is in half precision.
"""


def row_axis(tensor: Tensor, batch: int, dim: int) -> int | None:
    """Return the dimension of an input that is the batch, as its sizes tell; None if there is none."""
    return next(iter(_axes(tensor, batch, dim)), None)


def _axes(tensor: Tensor, batch: int, dim: int) -> list[int]:
    """Return the dimensions of an input that may be the batch, the likeliest first: masks have it first anywhere."""
    return [axis for axis in dict.fromkeys((dim, 0)) if axis < tensor.dim() and tensor.shape[axis] == batch]


def look_for_rows(model: nn.Module, batch: int, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note on adapted layers where the batch is in their inputs, in runs of a copy of the base.

    Raises:
        RefusedError: naming every layer whose input does not show it.
    """
    given = list(tensors_in((args, kwargs)))
    is_square = any(value.shape[:2] == (batch, batch) for value in given)
    tolerance = _TIGHT if is_square and _is_exact(model) else _LOOSE
    first: _Wrong = []
    for guess in itertools.islice(_guesses(given, batch, dim), _MOST_GUESSES):
        found, wrong = _seen(model, batch, args, kwargs, guess, tolerance)
        if not wrong:
            for layer, layouts in found.items():
                layer.__dict__.setdefault(LAYOUTS, {}).update(layouts)
            return
        first = first or wrong
    for layer, shape in first:
        layer.__dict__.get(LAYOUTS, {}).pop(len(shape), None)
    facts = [(next(iter(attached_to(layer))).spec.path, f"its input is {list(shape)}") for layer, shape in first]
    raise RefusedError(
        f"which part of these layers' inputs belongs to which of {batch} rows cannot be seen",
        list(dict.fromkeys(facts)),
        "keep these sites out of the rules of what is used in `lora_fx.rows`, or run the rows one by one",
    )


def _is_exact(model: nn.Module) -> bool:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled()


def _guesses(given: Sequence[Tensor], batch: int, dim: int) -> Iterator[_Guess]:
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
    model: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], guess: _Guess, tolerance: float
) -> tuple[_Found, _Wrong]:
    """Return where layers see the batch if the inputs have it where it is guessed, and the layers that do not show it.

    What was seen before of a layer counts.
    """
    found: _Found = {}
    wrong: _Wrong = []
    with trial_twin(model) as twin:
        (before, after), (first, second) = (
            [_inputs_of_a_run(twin, guess, args, kwargs, moved, batch if alike else 0) for moved in (False, True)]
            for alike in (False, True)
        )
        own = {copied: model.get_submodule(path) for path, copied in twin.named_modules()}
    for layer, calls in before.items():
        known = found.setdefault(own[layer], dict(own[layer].__dict__.get(LAYOUTS, {})))
        again = after.get(layer, [])
        for (shape, one), (_, other) in zip(calls, again, strict=False):
            fits = list(layouts_that_fit(one, other, batch, tolerance)) if len(calls) == len(again) else []
            if not fits and len(shape) in known and are_alike(one, batch):
                continue  # as of equal tokens, one each
            agreed = known.get(len(shape), fits[0]).agreed(fits[0]) if len(fits) == 1 else None
            if agreed is None:
                wrong.append((own[layer], shape))
                break
            known[len(shape)] = agreed
    named = {layer for layer, _ in wrong}
    for layer in _picked_by_values(
        before, first, second, batch, tolerance, {one: found.get(own[one], {}) for one in own}
    ):
        if own[layer] not in named:
            shapes = [shape for shape, _ in before.get(layer, first.get(layer, []))]
            wrong.append((own[layer], shapes[0]))
    return found, wrong


_Inputs = dict[nn.Module, list[tuple[torch.Size, list[Tensor]]]]
"""For each adapted layer, call by call, the shape of its input and sums for each entry of each dimension."""


def _picked_by_values(
    plain: _Inputs, before: _Inputs, after: _Inputs, batch: int, tolerance: float, found: Mapping[nn.Module, Any]
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
                or (layout := found[layer].get(len(shape))) is None
                or any(layout.agreed(fit) for fit in layouts_that_fit(one, other, batch, tolerance))
                for (shape, one), (_, other) in zip(given, moved, strict=True)
            )
        ):
            yield layer


def _inputs_of_a_run(
    twin: nn.Module, guess: _Guess, args: tuple[Any, ...], kwargs: dict[str, Any], moved: bool, alike_inside: int
) -> _Inputs:
    """Return for each adapted layer, call by call, sums of its input for each entry of each dimension.

    Args:
        twin: runs.
        guess: where the batch is in the inputs.
        args: of the call.
        kwargs: of the call.
        moved: whether the last row of the batch, changed, stands first, and each other one place later.
        alike_inside: the number of rows, if each is to be nearly one token, as input or behind the embedding of ids;
            0 if not.
    """
    args, kwargs = copied((args, kwargs), lambda tensor: tensor.detach().clone())
    seen = Seen()
    with contextlib.ExitStack() as stack:
        for switch in switches_in(twin):
            stack.enter_context(switch.chosen_here(Selection(rows=AdapterRows((None,), seen=seen))))
        stack.enter_context(torch.no_grad())
        for module in twin.modules() if alike_inside else ():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(_alike_inside(alike_inside, guess, moved)).remove)
        ids = [value for name, value in kwargs.items() if name.endswith("input_ids")]
        for tensor, axis in zip(tensors_in((args, kwargs)), guess, strict=True):
            if axis is not None:
                rows, are_ids = tensor.movedim(axis, 0), any(tensor is one for one in ids)
                tell_apart(rows, are_ids, alike_inside > 0)
                if moved:
                    change(rows, are_ids)
                    rows.copy_(rows.roll(1, 0))
        twin.eval().forward(*args, **kwargs)
    return seen.inputs


def _alike_inside(batch: int, guess: _Guess, moved: bool) -> Callable[..., Tensor | None]:
    """Return a hook of an embedding after which each row is nearly one token; ids stay, since models count some."""
    axes = [axis for axis in dict.fromkeys(guess) if axis is not None]

    def alike(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        axis = next((axis for axis in axes if output.dim() > 2 and output.shape[axis] == batch), None)
        if axis is None:
            return None
        rows = output.movedim(axis, 0).roll(-int(moved), 0)
        made = torch.stack([nearly_one_token(row, number) for number, row in enumerate(rows)])
        return made.roll(int(moved), 0).movedim(0, axis)

    return alike
