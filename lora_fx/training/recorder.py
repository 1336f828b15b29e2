"""Records a training run, line by line, while it runs."""

import operator
import os
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.sources.structure import MOST
from lora_fx.training.history import RecordedStep
from lora_fx.training.lines import RecordFileError
from lora_fx.training.norms import are_sharded, are_untrained, norms_of, watched_in
from lora_fx.training.output import RecordOutput


class Recorder:
    """Writes the losses of a training run, and ‖ΔW‖ of every adapter, to a file of JSON lines.

        with lora_fx.Recorder(tuned, "run.jsonl", every=10) as recorder:
            for batch in batches:
                ...
                optimizer.step()
                recorder.step(loss)

    A line holds the mean of the losses since the line before.  Between two lines no device is waited for.  Lines are
    appended, each whole; a run that goes on appends to the file of its first part.  In training on several processes
    each calls `step`, and that of rank 0 writes, its own losses.
    """

    def __init__(self, tuned: nn.Module, path: str | os.PathLike[str], every: int = 10) -> None:
        """Look at the model and at a file that is there already; nothing is written yet.

        Args:
            tuned: an adapted model, also in wrappers, or a module that holds one; it stays unchanged.
            path: of the file.
            every: number of steps between two lines.

        Raises:
            RefusedError: the model is not adapted, or its adapters have no values here.
            RecordFileError: the file cannot be written, is no record, or one of another model or run.
            ValueError: `every` is no number of steps.
        """
        if type(every) is not int or every < 1:
            raise ValueError(f"every is {every!r}; it must be a whole number from 1 on")
        self.every = every
        self._watched = watched_in(tuned)
        self._output = RecordOutput(path, self._watched.model, self._watched.sites)
        self._sum: Tensor | float | None = None
        self._losses = 0
        self._pending = False
        last = self._output.last
        self.reached = 0 if last is None else last.step
        """Number of the step that was noted last, by this run or by the one that goes on."""
        if last is not None and any(last.norms) and are_untrained(self._watched):
            raise RecordFileError(
                f"{self._output.name}: its run has trained the adapters up to step {last.step:,}, and those of this "
                "model are untrained\n  load what that run has saved first, or give a new run a file of its own"
            )

    def step(self, loss: Tensor | float | None, step: int | None = None, mean_of: int = 1) -> None:
        """Note the loss of a step that the optimizer has made, and write a line if it is time.

        Args:
            loss: one number, or a tensor of one; None where it is not known.
            step: number of optimizer steps so far; None counts on from the step before.
            mean_of: number of steps of which the loss is the mean.

        Raises:
            RefusedError: the loss is not one real number, or the adapters have no values here any more.
            RecordFileError: the file cannot be written, or something else has written to it.
            TypeError, ValueError: `loss`, `step` or `mean_of` is no such number; nothing is noted.
        """
        before = self.reached
        reached = before + 1 if step is None else _whole("step", step, 0)
        self._add(loss, _whole("mean_of", mean_of, 1))
        self.reached = reached
        before = min(before, self.reached - 1)  # it may go back to a checkpoint
        self._pending = True
        if self.reached // self.every > before // self.every:  # and go on by more than one
            self.write()

    def _add(self, loss: Tensor | float | None, mean_of: int) -> None:
        if loss is None:
            return
        if isinstance(loss, Tensor):
            if loss.numel() != 1 or loss.is_complex() or loss.is_meta:
                kind = "is complex" if loss.is_complex() else "is on the meta device"
                what = kind if loss.numel() == 1 else f"has {loss.numel():,} values"
                raise RefusedError(f"the loss {what}", advice="give the one that is trained on")
            loss = loss.detach().reshape(())
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32), copy=True)  # it may be changed in place
        else:
            loss = float(loss)
        loss = loss if mean_of == 1 else loss * mean_of
        self._sum = loss if self._sum is None else self._sum + loss
        self._losses += mean_of

    def write(self) -> None:
        """Write a line for the step that was noted last, unless there is one already; as `step` does."""
        if not self._pending:
            return
        loss = None if self._sum is None else float(self._sum) / self._losses
        line = RecordedStep(self.reached, loss, self._losses, norms_of(self._watched))
        self._sum, self._losses, self._pending = None, 0, False
        if _writes():
            self._output.append(line)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last step; after an exception too, so that the record ends where the run did."""
        if error is None:
            self.write()
        elif not are_sharded(self._watched):  # the other processes, which would have to take part, may go on training
            try:
                self.write()
            except Exception as failed:  # not in the place of the error that ended the run
                error.add_note(f"the last line of {self._output.name} was not written: {failed}")


def _whole(name: str, value: Any, least: int) -> int:
    """Return a number that the file can hold, also one of numpy or a tensor."""
    whole = operator.index(value)
    if not least <= whole < MOST:
        raise ValueError(f"{name} is {whole}; it must be a whole number from {least} on, below {MOST:,}")
    return whole


def _writes() -> bool:
    """Whether this is the process that writes."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0
