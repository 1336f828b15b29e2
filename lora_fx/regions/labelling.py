"""Compute a last block's rows where they are asked for: by a loss, of the tokens that have a label."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_fx.adapters.attach import STATE
from lora_fx.adapters.selection import Switch, is_apart
from lora_fx.capture.calls.ambient import AmbientState, ambient_state
from lora_fx.liveness.asked import Asked
from lora_fx.liveness.padding import Rows, unpacked_rows
from lora_fx.liveness.rows import LazyRows, lazy, whole
from lora_fx.liveness.sources import leaves_of
from lora_fx.models.torch_internals import pytree
from lora_fx.passes.labels import Labels
from lora_fx.regions.laterows import LateRows, Made
from lora_fx.regions.packed import packed_in
from lora_fx.regions.packing import RowTally, may_be_packed
from lora_fx.regions.remaking import Unchanged, check_unchanged, remade


@dataclass(slots=True)
class Labelled:
    """The code of a program that computes the rows that are asked for, and whether it has been proven."""

    labels: Labels
    function: Callable[..., Any]
    """Called with the module, the graph's inputs and `Asked`: the rows of each result that is rows, [1, N, width]."""
    proven: bool = False

    def draws(self, module: nn.Module) -> bool:
        """Whether a dropout of the block is on."""
        dropouts: list[Any] = [module.get_submodule(path) for path in self.labels.dropouts]
        return any(dropout.training and dropout.p for dropout in dropouts)


@dataclass(slots=True)
class Deferring:
    """What a region knows of leaving its rows for later."""

    last: bool = False
    """Whether it is the last of its blocks, whose result a loss may meet."""
    wanted: bool = False
    """Whether it or another block of its kind is, so that the kind's code is to be proven."""
    tally: RowTally = field(default_factory=RowTally)
    weights: tuple[int, ...] = ()
    """Identities of the module's own parameters as they were found; empty in a copy."""
    otherwise: dict[str, None] = field(default_factory=dict)
    """Why calls were not left for later."""
    turn: int = 1
    """The how manieth of calls in a row the latest one was: a block that a model runs again and again is given its own
    result."""
    turns: int = 1
    """The most of them; only the last can be left for later."""
    latest: "weakref.ref[Tensor] | None" = None
    """Its latest result."""

    def __getstate__(self) -> tuple[bool, bool]:
        return self.last, self.wanted

    def __setstate__(self, state: tuple[bool, bool]) -> None:
        self.last, self.wanted = state
        self.tally, self.weights, self.otherwise = RowTally(), (), {}
        self.turn, self.turns, self.latest = 1, 1, None

    def follow(self, labelled: Labelled | None, inputs: Sequence[Any], packing: RowTally) -> None:
        """Note of a call that is about to be made whether its hidden states are the latest result.

        What was asked for before more such calls in a row were seen than ever was asked for by the block itself.
        """
        if labelled is None or not self.last:
            return
        hidden, before = inputs[labelled.labels.hidden], None if self.latest is None else self.latest()
        in_a_row = before is not None and (hidden is before or hidden is _made_of(before))
        self.turn = self.turn + 1 if in_a_row else 1
        if self.turn > self.turns:
            self.turns, self.tally.asked, packing.asked = self.turn, 0, 0

    def noted(self, labelled: Labelled | None, result: Any) -> Any:
        """Return the result of that call, and note it."""
        if labelled is not None and self.last:
            leaf = pytree.tree_leaves(result)[labelled.labels.leaves[0].place]
            self.latest = weakref.ref(leaf) if isinstance(leaf, Tensor) else None
        return result

    def obstacle(self, labelled: Labelled, module: nn.Module, inputs: Sequence[Any]) -> str:
        """Return why a call cannot be left for later; empty if it can."""
        together = dist.is_available() and dist.is_initialized()
        if together and (not self.weights or self.weights != _parameters_of(module)):
            return "its weights were replaced, perhaps by some that are sharded after the call"  # by FSDP2
        if not may_be_packed(module):
            return "it has hooks, or something follows operations one by one"
        if not all(switch.now().weights for switch in switches_of(module)):
            return "its adapters are not used"
        if labelled.draws(module):
            return "its dropout draws for all rows at once"
        if not any(isinstance(value, Tensor) and value.requires_grad for value in (*inputs, *module.parameters())):
            return "no gradient passes through it"
        return ""


def _made_of(value: Tensor) -> Tensor | None:
    """Return what has been computed of a tensor that was left for later."""
    return value.lazy_value.made if type(value) is LazyRows else None


class Around:
    """What a block's result depends on besides tensors and autocast: modes, parameters, which adapters are used."""

    def __init__(self, module: nn.Module) -> None:
        self._modes = [(each, each.training) for each in module.modules()]
        self._parameters = _parameters_of(module)
        self._used = [(switch, switch.now()) for switch in switches_of(module)]

    def holds(self, module: nn.Module) -> bool:
        """Whether the module has the parameters that it had."""
        return _parameters_of(module) == self._parameters

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Set it up for a while: a loss may be computed after a `with lora_fx.use(…)` around the forward alone."""
        others = [(each, each.training) for each, training in self._modes if each.training != training]
        with contextlib.ExitStack() as stack:
            for switch, used in self._used:
                if switch.now() != used:
                    stack.enter_context(switch.chosen_here(used))
            try:
                for each, training in others:
                    each.training = not training
                yield
            finally:
                for each, training in others:
                    each.training = training


def _parameters_of(module: nn.Module) -> tuple[int, ...]:
    return tuple(map(id, module.parameters()))


def switches_of(module: nn.Module) -> list[Switch]:
    """Return what chooses among the adapters of a block, each once."""
    states = (each.__dict__.get(STATE) for each in module.modules())
    return list(dict.fromkeys(state.switch for state in states if state is not None))


class DeferredCall:
    """One call of a block, to be made for the rows that are asked for."""

    def __init__(
        self,
        labelled: Labelled,
        module: nn.Module,
        inputs: tuple[Any, ...],
        rows: Rows | None,
        otherwise: Callable[[], Any],
        tally: RowTally,
    ) -> None:
        """Note a call.

        Args:
            labelled: the code.
            module: of the block.
            inputs: of its graph.
            rows: which of its hidden states there are, where they are packed; others are computed with all.
            otherwise: makes the whole call, as without this.
            tally: of the region.
        """
        self.labelled, self.module, self.inputs, self.rows = labelled, module, inputs, rows
        self._otherwise, self._tally = otherwise, tally
        self._around = Around(module)
        given = [value for value in inputs if isinstance(value, Tensor)]
        plain = [value for value in given if type(value) is not LazyRows]
        self.device = given[0].device
        self._unchanged = Unchanged([*plain, *module.parameters(), *module.buffers()])
        sources = [*(leaf for value in given for leaf in leaves_of(value)), *module.parameters()]
        self.sources = tuple({id(tensor): tensor for tensor in sources if tensor.requires_grad}.values())
        self._ambient: AmbientState = ambient_state({self.device})
        self._taken: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._whole: list[Any] | None = None
        tally.packed += 1

    def result(self) -> Any:
        """Return what the block returns, in which no row has been computed."""
        return self.labelled.labels.early(self.module, *self.inputs, self)

    def show(self, number: int) -> Tensor:
        """Return what stands for one of the results that are rows."""
        return lazy(BlockRows(self, number))

    def rows_of(self, number: int, asked: Asked) -> Tensor:
        """Return rows of a result, [1, N, width]: for the second to ask, those of the first one or out of all."""
        again = self._taken is None or torch.equal(self._taken[0], asked.rows.index)
        there = self.rows is None or not bool((self.rows.places[asked.rows.index] < 0).any())
        if self._whole is None and again and there:
            return self._made(asked)[number]
        return self.whole(number).flatten(0, 1).index_select(0, asked.rows.index).unsqueeze(0)

    def _made(self, asked: Asked) -> tuple[Tensor, ...]:
        if self._taken is None:
            self._check()
            inputs, at = list(self.inputs), self.labelled.labels.hidden
            packed = packed_in(inputs[at])
            with remade(self._ambient, None), self._around.again():
                if packed is not None:
                    inputs[at].lazy_value.note_taken()
                    inputs[at] = unpacked_rows(packed.packed, packed.call.rows)
                elif type(inputs[at]) is LazyRows:
                    inputs[at] = whole(inputs[at])
                self._taken = asked.rows.index, self.labelled.function(self.module, *inputs, asked)
        return self._taken[1]

    def whole(self, number: int) -> Tensor:
        """Return all rows of a result."""
        value = self.all_rows(number)
        return whole(value) if type(value) is LazyRows else value

    def all_rows(self, number: int) -> Tensor:
        """Return a result as the whole call gives it."""
        if self._whole is None:
            self._check()
            self._tally.note_asked()
            with remade(self._ambient, None), self._around.again():
                self._whole = pytree.tree_leaves(self._otherwise())
        value: Tensor = self._whole[self.labelled.labels.leaves[number].place]
        return value

    def _check(self) -> None:
        check_unchanged(self._around.holds(self.module) and not is_apart(), "rows of a block")
        self._unchanged.check("rows of a block")


class BlockRows(LateRows):
    """Rows of what a block returns."""

    def __init__(self, call: DeferredCall, number: int) -> None:
        self.call, self.number = call, number
        leaf, labels = call.labelled.labels.leaves[number], call.labelled.labels
        self.shape = torch.Size((*call.inputs[labels.hidden].shape[:2], leaf.width))
        self.dtype, self.device, self.inputs = leaf.dtype, call.device, call.sources

    def computed(self, asked: Asked, made: Made) -> Tensor:
        return self.call.rows_of(self.number, asked)

    def all_rows(self) -> Tensor:
        return self.call.all_rows(self.number)

    def whole(self) -> Tensor:
        return self.call.whole(self.number)

    def unreachable(self) -> Tensor | None:
        return None if self.call.rows is None else self.call.rows.dead


def may_be_deferred(deferring: Deferring, labelled: Labelled, module: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether a call may be left for later: of a last block, which nothing follows, and which draws nothing."""
    if not deferring.last or deferring.tally.stopped or deferring.turn < deferring.turns:
        return False
    reason = deferring.obstacle(labelled, module, inputs)
    if reason:
        deferring.otherwise[reason] = None
    return labelled.proven and not reason
