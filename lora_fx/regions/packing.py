"""Run a block's graph on the rows of real tokens, where its mask says that there are others."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_fx.adapters.attach import STATE
from lora_fx.adapters.fused.eligible import is_watched
from lora_fx.adapters.selection import is_apart
from lora_fx.adapters.trained import TRAINED
from lora_fx.capture.calls.ambient import AmbientState, RandomState, ambient_state
from lora_fx.liveness.padding import Remembered, Rows, packed_rows, rows_under, soft_minimum, unpacked_rows
from lora_fx.liveness.rows import LazyRows
from lora_fx.models.torch_internals import pytree
from lora_fx.passes.pack import Packing
from lora_fx.regions.packed import PackedRows, packed_in, shown
from lora_fx.regions.remaking import Remaking, Results, Unchanged, check_unchanged, remade

MOST_ASKED = 2
"""How often the whole of what was packed may be asked for before a block stops packing, if that is most of the time."""


_COUNTS: ContextVar[bool] = ContextVar("lora_fx_counts", default=True)


@contextlib.contextmanager
def uncounted(proving: bool) -> Iterator[None]:
    """Let nobody count that all rows are asked for, if that is to prove something on them once."""
    token = _COUNTS.set(_COUNTS.get() and not proving)
    try:
        yield
    finally:
        _COUNTS.reset(token)


@dataclass(slots=True)
class Packed:
    """The code of a program that runs on packed rows, and what has been proven of it."""

    function: Callable[..., Any]
    """Called with the module, the graph's inputs and the call."""
    packing: Packing
    proven: bool = False
    found: Remembered = field(default_factory=Remembered)
    soft: float | None = None
    """The least number of a mask that was no padding, though it may have been meant as such."""

    def rows(self, module: nn.Module, inputs: tuple[Any, ...]) -> Rows | None:
        """Return the rows to run on: of hidden states that are packed theirs; None if all."""
        packing = self.packing
        hidden = inputs[packing.hidden]
        given = packed_in(hidden)
        masks = tuple(inputs[index] for index in packing.masks)
        batch, length = hidden.shape[:2]
        own: Rows | None = self.found.of(masks, (batch, length), lambda: self._found(module, inputs, batch, length))
        if given is None:
            return own
        return given.call.rows if given.call.rows.drops_only_dead_of(own) else None

    def _found(self, module: nn.Module, inputs: tuple[Any, ...], batch: int, length: int) -> Rows | None:
        masks = self.packing.mask_of(module, *inputs)
        rows = rows_under(masks, batch, length)
        self.soft = soft_minimum(masks) if rows is None else self.soft
        return rows

    def run(self, call: "PackedCall | ProvingCall") -> Any:
        """Return what the block returns, in which rows of padding have not been computed."""
        inputs = list(call.inputs)
        hidden, given = inputs[self.packing.hidden], call.given
        inputs[self.packing.hidden] = packed_rows(hidden, call.rows) if given is None else given.packed
        result = self.function(call.module, *inputs, call)
        call.forget_rows()
        return result


@dataclass(slots=True)
class RowTally:
    """How often a region ran on packed rows, and how often somebody asked for the others."""

    packed: int = 0
    asked: int = 0
    why: ClassVar[str] = "what it leaves out is asked for: rows of padding are used outside of the blocks"

    def note_asked(self) -> None:
        """Note that all rows are asked for, unless it is to prove something on them."""
        self.asked += _COUNTS.get()

    @property
    def stopped(self) -> bool:
        """Whether packing gains nothing, as most of its results are asked for as a whole."""
        return self.asked >= MOST_ASKED and 2 * self.asked > self.packed


class PackedCall(Remaking):
    """One call of a block on packed rows: what it takes to make it again with all of them."""

    def __init__(
        self,
        packed: Packed,
        function: Callable[..., Any],
        module: nn.Module,
        inputs: tuple[Any, ...],
        rows: Rows,
        tally: RowTally,
    ) -> None:
        self.rows = rows
        self.module = module
        self.inputs = inputs
        self._function = function
        self._hidden = packed.packing.hidden
        self.given: PackedRows | None = packed_in(inputs[self._hidden])
        if self.given is not None:
            inputs[self._hidden].lazy_value.note_taken()
        self._before: tuple[Remaking, int] | None = None
        self._tally = tally
        self._ambient: AmbientState = ambient_state({rows.index.device})
        self._random = RandomState(self._ambient.devices) if packed.packing.draws else None
        self._state = _state_of(module, inputs)
        self._trained = Unchanged(parameter for parameter in module.parameters() if parameter.requires_grad)
        tally.packed += 1

    def show(self, x: Tensor, leaf: int) -> Tensor:
        """Return packed rows as the caller of the block shall see them."""
        return shown(x, self, leaf)

    def forget_rows(self) -> None:
        """Keep of packed hidden states only how they were made: their rows are not needed to make all rows again."""
        if self.given is not None:
            self.inputs = (*self.inputs[: self._hidden], None, *self.inputs[self._hidden + 1 :])
            self._before = (self.given.call, self.given.leaf)
            self.given = None

    def parents(self) -> tuple[Remaking, ...]:
        return () if self._before is None else (self._before[0],)

    def note_asked(self) -> None:
        self._tally.note_asked()

    def again(self, made: Results) -> list[Any]:
        check_unchanged(_state_of(self.module, self.inputs) == self._state)
        self._trained.check("rows of padding")
        inputs = list(self.inputs)
        if self._before is not None:
            call, leaf = self._before
            inputs[self._hidden] = made[call][leaf]
        with remade(self._ambient, self._random):
            leaves: list[Any] = pytree.tree_leaves(self._function(self.module, *inputs))
        return leaves


class ProvingCall:
    """Stands for a call where packed code is compared: what it leaves out is zeros."""

    given: PackedRows | None = None

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], rows: Rows) -> None:
        self.module = module
        self.inputs = inputs
        self.rows = rows

    def show(self, x: Tensor, leaf: int) -> Tensor:
        return unpacked_rows(x, self.rows)

    def forget_rows(self) -> None:
        """Keep all."""


def is_packed(packed: Packed, inputs: tuple[Any, ...]) -> bool:
    """Whether the hidden states among the inputs are packed rows, and the only ones that are computed late."""
    late = [index for index, value in enumerate(inputs) if type(value) is LazyRows]
    return late == [packed.packing.hidden] and packed_in(inputs[late[0]]) is not None


def may_be_packed(module: nn.Module) -> bool:
    """Whether a call may leave out rows of padding: nothing follows it that would meet them."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not (hooks or is_watched() or is_apart())


def _state_of(module: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    """Return what a call depends on: modes, which adapters are on, which tensors, how often each was written to."""
    found: list[Any] = [value for value in inputs if type(value) in (Tensor, nn.Parameter)]
    modes: list[Any] = []
    for each in module.modules():
        state = each.__dict__.get(STATE) or each.__dict__.get(TRAINED)
        modes.append((each.training, None if state is None else state.switch.now()))
        found += each._parameters.values()
    return modes + [(id(tensor), tensor._version) for tensor in found if tensor is not None]
