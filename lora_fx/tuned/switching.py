"""Which of its adapters a model uses: chosen for every thread, or for one thread and a while."""

import contextlib
import dis
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import TypeAlias

from torch import Tensor, nn

from lora_fx.adapters.attach import SWITCH
from lora_fx.adapters.selection import Selection, Switch
from lora_fx.adapters.trained import added_value, are_equal, trained_owners
from lora_fx.errors import RefusedError
from lora_fx.models.between import between_calls
from lora_fx.models.wrappers import seen_through
from lora_fx.rules.given import is_number
from lora_fx.text import dotted
from lora_fx.tuned.asking import ask_layers
from lora_fx.tuned.build import places_in
from lora_fx.tuned.undo import show_base

Adapters: TypeAlias = str | Sequence[str] | Mapping[str, float] | None
"""One adapter, several, several with weights, or none."""


class Use(AbstractContextManager[None]):
    """What `use` returns: nothing to be kept, or, in a `with` statement, the end of the choice."""

    def __init__(self, choices: Sequence[tuple[Switch, Selection]], for_a_while: bool) -> None:
        self._choices = tuple(choices)
        self._before = None if for_a_while else tuple(switch.everywhere for switch, _ in choices)
        self._open: contextlib.ExitStack | None = None
        self._is_over = False
        if not for_a_while:
            for switch, selection in choices:
                switch.choose(selection)

    def __enter__(self) -> None:
        if self._open is not None:
            raise RuntimeError("this choice of adapters holds already; call lora_fx.use once more")
        if self._before is not None:  # it was made before it was known that it is for a while
            for (switch, _), before in zip(self._choices, self._before, strict=True):
                switch.choose(before)
        with contextlib.ExitStack() as stack:
            for switch, selection in self._choices:
                stack.enter_context(switch.chosen_here(selection))
            self._open = stack.pop_all()

    def __exit__(self, *raised: object) -> None:
        assert self._open is not None
        self._open.close()
        self._is_over = True

    def __repr__(self) -> str:
        chosen = ", ".join(dict.fromkeys(str(selection) for _, selection in self._choices))
        if self._open is not None:
            return f"<{'no longer in use' if self._is_over else 'in use until the end of the block'}: {chosen}>"
        holds = self._before is not None and all(switch.everywhere == one for switch, one in self._choices)
        return f"<{'in use' if holds else 'not in use'}: {chosen}>"


def use(tuned: nn.Module, adapters: Adapters) -> Use:
    """Let a model use these adapters, in place: from now on and in all threads; in a `with`, here until its end.

    The model computes W + Σ weight · ΔW at each site, over the adapters that are there; weights stay as they are, and
    nothing is captured or compiled again.  What `apply` or `load` has made uses all it has until something else is
    chosen.

    >>> import lora_fx
    >>> rules = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2}}]}
    >>> tuned = lora_fx.apply(nn.Sequential(nn.Linear(3, 5)), rules)
    >>> lora_fx.add(tuned, rules, adapter="b")
    >>> choice = lora_fx.use(tuned, "b")
    >>> with lora_fx.use(tuned, {"default": 0.7, "b": -0.3}):
    ...     print(lora_fx.list_adapters(tuned)["default"].weight)
    0.7
    >>> print(*(adapter.name for adapter in lora_fx.list_adapters(tuned) if adapter.active))
    b

    Args:
        tuned: an adapted model, changed in place.
        adapters: a name; several names; a dict of weights, factors of ΔW without a unit; or None for the base alone.

    Raises:
        ValueError: a name that no site has, or a weight that is not a finite number; nothing is changed.
        RefusedError: the model is not adapted; or it has modules or biases that are trained whole, which belong to all
            of its adapters; or a GraphModule has an adapter that only its graph can compute.
    """
    caller = inspect.currentframe()
    caller = None if caller is None else caller.f_back
    tuned = seen_through(tuned)
    switches = switches_in(tuned)
    known = names_of(switches)
    selection = selection_of(known, adapters)
    if any(switch.whole for switch in switches):
        _refuse_whole(tuned, selection)
    if selection != Selection.of(known):
        ask_layers(tuned)
    if not selection.weights:
        _refuse_moved(tuned, show_base(tuned, places_in(tuned)))
    choices = [(switch, selection) for switch in switches]
    if caller is not None and _opens_a_block(caller):
        return Use(choices, for_a_while=True)
    with between_calls(tuned):
        return Use(choices, for_a_while=False)


def chosen_for_a_while(tuned: nn.Module, adapters: Adapters) -> AbstractContextManager[None]:
    """Return a context in which this thread uses these adapters, as `use` says; None leaves what is in use.

    Raises:
        ValueError, RefusedError: as `use`; nothing where all adapters are meant as they are, which may be in a graph.
    """
    if adapters is None:
        return contextlib.nullcontext()
    switches = switches_in(tuned)
    known = names_of(switches)
    selection = selection_of(known, adapters)
    _refuse_whole(tuned, selection)
    if selection != Selection.of(known):
        ask_layers(tuned)
    return Use([(switch, selection) for switch in switches], for_a_while=True)


def _refuse_whole(tuned: nn.Module, selection: Selection) -> None:
    """Raise RefusedError where the selection asks for values of trained modules that there are not."""
    facts = []
    for path, owner, state in trained_owners(tuned):
        chosen = dict(selection.at(state.switch.names))
        for name, owners in state.owners.items():
            shares = [chosen.get(adapter, 0.0) for adapter in owners or ()]
            if len(set(shares)) > 1:
                facts.append((dotted(path, name), f"was trained with {', '.join(owners or ())} together"))
                continue
            others = [chosen[one] for one in chosen if added_value(owner, one, name) is not None]
            mixed = [share for share in (*shares[:1], *others) if share]
            if owners is not None and name in owner._buffers and mixed not in ([], [1.0]):
                facts.append((dotted(path, name), "is a buffer, and values of buffers are not mixed"))
    if facts:
        advice = "use these adapters alone, or together as they were trained"
        raise RefusedError("modules that are trained whole have no such values", facts, advice)


def _refuse_moved(tuned: nn.Module, base: Mapping[str, Tensor]) -> None:
    """Raise RefusedError where a model has changed what only it has, in place of what its base has."""
    moved = [(name, "has changed") for name, value in base.items() if not are_equal(tuned._buffers.get(name), value)]
    if moved:
        raise RefusedError("the buffers of a GraphModule itself cannot be its base's in one thread alone", moved)


_WITH = {dis.opmap[name] for name in ("BEFORE_WITH",) if name in dis.opmap}


def _opens_a_block(caller: FrameType) -> bool:
    """Whether the result of the call that runs now is what a `with` statement enters.

    Then other threads must not see the choice even for the moment until it is entered.
    """
    code, place = caller.f_code.co_code, caller.f_lasti + 2
    while place < len(code) and not code[place]:  # a call's cache
        place += 2
    return place < len(code) and code[place] in _WITH


def switches_in(tuned: nn.Module) -> list[Switch]:
    """Return the switches of an adapted model, or of all that a model holds.

    Raises:
        RefusedError: the model is not adapted.
    """
    known: Switch | None = tuned.__dict__.get(SWITCH)
    return [place.record.switch for place in places_in(tuned)] if known is None else [known]


def names_of(switches: Iterable[Switch]) -> tuple[str, ...]:
    """Return the names of the adapters that switches know, each once."""
    return tuple(dict.fromkeys(name for switch in switches for name in switch.names))


def selection_of(known: Collection[str], adapters: Adapters) -> Selection:
    """Return the selection of these adapters, each of which must be known."""
    if adapters is None:
        weights: dict[str, float] = {}
    elif isinstance(adapters, str):
        weights = {adapters: 1.0}
    elif isinstance(adapters, Mapping):
        weights = dict(adapters)
    else:
        names = _names(adapters)
        refuse_unknown(names, known)
        weights = dict.fromkeys(names, 1.0)
        if len(weights) < len(names):
            raise ValueError(f"an adapter is named twice: {', '.join(names)}; give a dict of weights instead")
    refuse_unknown(weights, known)
    bad = [name for name, weight in weights.items() if not is_number(weight)]
    if bad:
        raise ValueError(f"weights must be finite numbers: {', '.join(f'{name}: {weights[name]!r}' for name in bad)}")
    return Selection(tuple((name, float(weight)) for name, weight in weights.items() if weight))


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Raise ValueError for names that no adapter has."""
    unknown = dict.fromkeys(repr(name) for name in names if not isinstance(name, str) or name not in known)
    if unknown:
        raise ValueError(f"no adapter is called {', '.join(unknown)}; there are {', '.join(known)}")


def _names(adapters: object) -> list[str]:
    if isinstance(adapters, bytes) or not isinstance(adapters, Iterable):
        wanted = "a name, several, a dict of weights, or None for the base"
        raise ValueError(f"adapters must be {wanted}, found {type(adapters).__name__}")
    return list(adapters)
