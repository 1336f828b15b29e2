"""What rows that are computed later come from: two questions, `take(rows)` and `whole()`, whoever answers them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import RefusedError

Step = Callable[[Tensor], Tensor]
"""Makes rows of rows, each of its own row alone."""


class Cast:
    """The step to another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.to(self.dtype)

    def widens(self, dtype: torch.dtype) -> bool:
        """Whether every number of another dtype is one of this."""
        return torch.promote_types(self.dtype, dtype) is self.dtype


class RowSource:
    """Base of what a LazyRows can come from.

    `shape` is [*rows, features]; rows are numbered as they lie in it, from 0.  `inputs` are the tensors that gradients
    reach: all that `take` and `whole` are differentiable functions of.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    inputs: tuple[Tensor, ...] = ()

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows of these numbers, [len(rows), features], differentiable in `inputs`."""
        raise NotImplementedError

    def whole(self) -> Tensor:
        """Return all of it, in its shape, differentiable in `inputs`; asked for once, with gradients enabled."""
        raise NotImplementedError

    def through(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return what a torch function gives of a tensor of these rows, lazy or not, without having all of them.

        NotImplemented, as here, leaves it to what is known of all sources.
        """
        return NotImplemented

    def unreachable(self) -> Tensor | None:
        """Return which rows are no function of `inputs` though they may have a gradient, bools [*rows]; None: none."""
        return None

    def passed_on(self, gradient: Tensor, wanted: Sequence[Tensor], again: bool) -> Sequence[Tensor | None]:
        """Return what a gradient of all of it is for those of `inputs` that are wanted, where torch saw none of it.

        Args:
            gradient: of the whole.
            wanted: those of the inputs.
            again: whether the result is to be differentiable.

        Raises:
            RefusedError: a row has a gradient that cannot be passed on.
        """
        rows = self.unreachable()
        if rows is not None and bool(gradient[rows].any()):
            raise RefusedError(
                "code that torch does not show has used rows of padding, whose gradient is not computed",
                advice='apply without "liveness" in `optimise`',
            )
        with torch.enable_grad():
            made = self.again()
        return torch.autograd.grad(made, wanted, gradient, create_graph=again, allow_unused=True)

    def again(self) -> Tensor:
        """Return what `whole` does, with a history of its own."""
        return self.whole()

    def steps(self) -> "Steps":
        """Return what can be computed row by row, from the first source on; see `Steps`."""
        return Steps(self)


class Steps:
    """A source, which of its rows are meant (None: all), and what is done to each of them, in this order."""

    def __init__(self, source: RowSource, rows: Tensor | None = None, steps: tuple[Step, ...] = ()) -> None:
        self.source = source
        self.rows = rows
        self.steps = steps

    def then(self, rows: Tensor | None, step: Step | None) -> "Steps":
        """Return these with another choice among the rows, and another step, after them."""
        if rows is not None and self.rows is not None:
            rows = self.rows[rows]
        return Steps(
            self.source, self.rows if rows is None else rows, self.steps if step is None else (*self.steps, step)
        )


class LazyValue:
    """The value of one lazy tensor: computed once, as a whole, or row by row until then."""

    def __init__(self, source: RowSource) -> None:
        self.source = source
        self.made: Tensor | None = None
        self.version = 0
        self.taken = False
        """Whether rows of it have been used, by which gradients reach the source and not this tensor."""

    def chain(self) -> Iterator["LazyValue"]:
        """Yield this value and those that it is made of."""
        value: LazyValue | None = self
        while value is not None:
            yield value
            value = value.source.parent if isinstance(value.source, Derived) else None

    @property
    def is_whole(self) -> bool:
        """Whether it, or what it is made of, has been computed as a whole: from then on that is the tensor."""
        return any(value.made is not None for value in self.chain())

    def whole(self) -> Tensor:
        """Return all of it, differentiable, the same tensor each time."""
        if self.made is None:
            # what it keeps is not kept by a checkpoint that is around its first reader: the next one finds it made
            hooks = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
            with torch.inference_mode(False), torch.enable_grad(), hooks:
                self.made = self.source.whole()
            self.version = self.made._version
        return self.made

    def take(self, rows: Tensor) -> Tensor:
        """Return the rows of these numbers, differentiable."""
        if self.is_whole:
            return self.whole().reshape(-1, self.source.shape[-1]).index_select(0, rows)
        self.note_taken()
        return self.source.take(rows)

    def note_taken(self) -> None:
        """Note that rows are used: gradients will not pass through the tensors of the chain."""
        for value in self.chain():
            value.taken = True

    @property
    def is_changed(self) -> bool:
        """Whether somebody has written to it since it was made."""
        return self.made is not None and self.made._version != self.version


class Derived(RowSource):
    """What an operation on rows makes of a lazy tensor: other rows, another shape of rows, or each row otherwise."""

    def __init__(
        self,
        parent: LazyValue,
        shape: torch.Size,
        operation: Step,
        rows: Tensor | None = None,
        step: Step | None = None,
        dtype: torch.dtype | None = None,
        copies: bool = False,
        cut: bool = False,
    ) -> None:
        """Note what is done.

        Args:
            parent: the value that it is made of.
            shape: of the result, [*rows, features].
            operation: makes it of the whole parent.
            rows: which of the parent's rows those of the result are; None: the same, in the same order.
            step: what is done to each row; None: nothing.
            dtype: of the result, where it is another one.
            copies: whether the result has memory of its own, and not that of the parent.
            cut: whether no gradient passes.
        """
        self.parent = parent
        self.shape = shape
        self.dtype = dtype or parent.source.dtype
        self.device = parent.source.device
        self.operation = operation
        self.rows = rows
        self.step = step
        self.copies = copies or step is not None
        self.cut = cut
        self.inputs = () if cut else parent.source.inputs

    def take(self, rows: Tensor) -> Tensor:
        taken = self.parent.take(rows if self.rows is None else self.rows.reshape(-1)[rows])
        taken = taken if self.step is None else self.step(taken)
        return taken.detach() if self.cut else taken

    def whole(self) -> Tensor:
        before = self.parent.whole()
        if self.copies and self.parent.is_changed:
            raise written_since()
        made = self.operation(before)
        return made.detach() if self.cut else made

    def unreachable(self) -> Tensor | None:
        rows = self.parent.source.unreachable()
        if rows is None:
            return None
        return rows.reshape(self.shape[:-1]) if self.rows is None else rows.reshape(-1)[self.rows]

    def again(self) -> Tensor:
        if any(value.is_changed for value in self.parent.chain()):
            return self.whole()
        made = self.operation(self.parent.source.again())
        return made.detach() if self.cut else made

    def steps(self) -> Steps:
        rows = None if self.rows is None else self.rows.reshape(-1)
        return self.parent.source.steps().then(rows, self.step)


def written_since() -> RefusedError:
    """Return the error of a tensor that cannot be computed any more."""
    return RefusedError(
        "a tensor that is computed late was made of another one, and that has been written to since",
        advice="write to it before anything is made of it, or to a clone of it",
    )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def leaves_of(x: Any) -> tuple[Tensor, ...]:
    """Return the tensors through which gradients leave an input: its own, where it is computed late itself."""
    value = getattr(x, "lazy_value", None)
    return value.source.inputs if isinstance(value, LazyValue) else (x,)
