"""What layers are given while a model runs on batches of data."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample
from lora_fx.progress.steps import step
from lora_fx.regions.survey import unchanged_modes


class Statistic(Protocol):
    """What is kept of the rows that a layer is given."""

    def add(self, rows: Tensor) -> None:
        """Take rows [N, in] into account."""


class Noted(NamedTuple):
    """A layer whose inputs are noted."""

    owner: str
    path: str
    """What errors call it."""
    statistic: Statistic


def note_inputs(model: nn.Module, layers: Sequence[Noted], batches: Sequence[Sample]) -> None:
    """Run a model on batches in eval mode, and give statistics, in place, the rows that their layers are given.

    Rows of padding, and those that the labels leave out (-100), do not count where a batch says so.

    Raises:
        RefusedError: a layer is given NaN or infinite values.
    """
    with unchanged_modes(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        model.eval()
        counting: list[Tensor | None] = [None]
        for layer in layers:
            note = _noting(layer.path, layer.statistic, counting)
            handle = model.get_submodule(layer.owner).register_forward_pre_hook(note, with_kwargs=True)
            hooks.callback(handle.remove)
        with step("running the data", len(batches), "batches") as doing:
            for batch in batches:
                counting[0] = _rows_that_count(batch)
                model(*batch.args, **batch.kwargs)
                doing.advance()


def _noting(path: str, statistic: Statistic, counting: list[Tensor | None]) -> Callable[..., None]:
    def note(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = next(iter((*args, *kwargs.values())))
        rows, mask = x.detach().reshape(-1, x.shape[-1]), counting[0]
        if mask is not None and mask.shape == x.shape[:-1]:
            rows = rows[mask.reshape(-1).to(rows.device)]
        if not torch.isfinite(rows).all():
            raise RefusedError("the data makes NaN or infinite values", [(path, "is given them")])
        statistic.add(rows)

    return note


def _rows_that_count(batch: Sample) -> Tensor | None:
    """Return a mask of the rows that are neither padding nor ignored by the loss; None where nothing says so."""
    mask, labels = batch.kwargs.get("attention_mask"), batch.kwargs.get("labels")
    counts = mask.bool() if isinstance(mask, Tensor) else None
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        learnt = labels != -100
        counts = learnt if counts is None or counts.shape != learnt.shape else counts & learnt
    return counts
