"""Which adapters of a model are used, and how much of each: by every thread, or by one thread for a while."""

import asyncio
import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_fx.adapters.rows import AdapterRows
from lora_fx.adapters.tokens import EVERYWHERE, Tokens
from lora_fx.errors import RefusedError
from lora_fx.models.torch_internals import checkpointed_call, in_backward

Chosen = tuple[tuple[str, float], ...]
"""Adapters by name, each with its weight."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a forward uses of a model's adapters: W + Σ weight · ΔW of each; with none, the base."""

    weights: Chosen = ()
    """Each adapter at most once, none with the weight 0."""
    rows: AdapterRows | None = None
    """Instead of all that: the adapters of a batch, row by row."""
    tokens: Tokens | None = None
    """While a call runs of a model with such adapters: on which of its tokens those with an invocation act."""

    @property
    def is_apart(self) -> bool:
        """Whether rows or tokens of one call are computed with other adapters than others."""
        return self.rows is not None or (self.tokens is not None and not self.tokens.everywhere)

    @staticmethod
    def of(names: Iterable[str]) -> "Selection":
        """Return the selection of these adapters, each as it was trained."""
        return Selection(tuple((name, 1.0) for name in dict.fromkeys(names)))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters in it."""
        if self.rows is not None:
            return tuple(name for name in dict.fromkeys(self.rows.names) if name is not None)
        return tuple(name for name, _ in self.weights)

    def at(self, names: Collection[str]) -> Chosen:
        """Return what is used at a site that holds adapters of these names.

        Raises:
            RefusedError: each row has an adapter of its own, and this is a place where all have the same weight.
        """
        mixed = [] if self.rows is None else [name for name in dict.fromkeys(self.rows.names) if name in names]
        if mixed:
            raise RefusedError(
                "code reads an adapted weight itself, and cannot use another one for each row",
                [(str(name), "is used for some rows") for name in mixed],
                "keep these sites out of the rules of what is used in `lora_fx.rows`",
            )
        found = []
        for pair in self.weights:  # a generator would be two calls for each layer's
            if pair[0] in names:
                found.append(pair)
        return tuple(found)

    def share(self, name: str) -> float:
        """Return how much of an adapter is used, 0 if it is not; 1 if it is used for some rows."""
        return float(name in self.names) if self.rows is not None else dict(self.weights).get(name, 0.0)

    def __str__(self) -> str:
        if self.rows is not None:
            return f"an adapter for each of {len(self.rows.names)} rows"
        shown = (name if weight == 1 else f"{weight:g} · {name}" for name, weight in self.weights)
        return " + ".join(shown) or "the base"


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """What one thread uses of a model for a while."""

    switch: "Switch"
    selection: Selection


def _without(choices: tuple[_Choice, ...], gone: _Choice) -> tuple[_Choice, ...]:
    return tuple(one for one in choices if one is not gone)


class Switch:
    """What a model uses; one object, shared by all its adapters, and one of its own in a copy of the model."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        """Of the adapters that the model has."""
        self.everywhere = Selection.of(self.names)
        """What threads use that have nothing else chosen."""
        self.invocations: dict[str, tuple[int, ...]] = {}
        """Of the adapters that act from an invocation on: its tokens."""
        self.additions = 0
        """How often adapters were added: what calls have shown before, they have not shown of these."""
        self.whole: tuple[str, ...] = ()
        """Names of the model's own parameters that are trained: they belong to no adapter alone."""
        self.first: Selection | None = None
        """What was used before anything else was chosen; None as long as nothing was."""
        self.is_open = False
        """Whether some thread has something else chosen for a while; compiled code must ask then."""
        self.in_tasks = False
        """Whether one of them is a task, of which compiled code knows nothing."""
        self._opened = self._in_tasks = 0

    def now(self) -> Selection:
        """Return what this thread uses."""
        if self.first is None:
            return self.everywhere
        if torch.compiler.is_compiling():
            return self._compiled()
        return self.of_thread()

    def of_thread(self) -> Selection:
        """Return what this thread uses, asked where no compiler follows."""
        chosen = next((one.selection for one in reversed(_HERE.get()) if one.switch is self), self.everywhere)
        gone = [name for name in chosen.names if name not in self.names]
        if gone:
            raise RefusedError(
                "adapters that this thread uses were dropped or renamed meanwhile",
                [(name, "is no longer there") for name in gone],
                "leave the context of `lora_fx.use` before",
            )
        return chosen

    def for_call(self) -> Selection:
        """Return what the call that begins uses: what this thread uses, or, if it is made again, what it used before.

        A forward that is made again in the backward pass (checkpointing) may be in another thread, and after the choice
        has changed.
        """
        if self.first is None or torch.compiler.is_compiling():
            return self.now()
        chosen, call = self.now(), checkpointed_call()
        if call is None:
            return chosen
        kept: dict[Switch, Selection] = getattr(call, _KEPT, {})
        if self not in kept:
            setattr(call, _KEPT, {**kept, self: self.first if in_backward() else chosen})
        return getattr(call, _KEPT)[self]  # type: ignore[no-any-return]

    def _compiled(self) -> Selection:
        """Return what this thread uses, as far as a compiler can follow: it checks that at each call of its code."""
        for one in () if self.in_tasks else reversed(_THREAD.chosen):
            if one.switch is self:
                return one.selection
        return _asked_outside(self) if self.is_open else self.everywhere

    def choose(self, selection: Selection) -> None:
        """Let every thread use this that has nothing else chosen."""
        self.first = self.first or self.everywhere
        self.everywhere = selection

    @contextlib.contextmanager
    def chosen_here(self, selection: Selection) -> Iterator[None]:
        """Let this thread, and no other, use this for a while."""
        self.first = self.first or self.everywhere
        choice, thread, in_tasks = _Choice(self, selection), _THREAD.__dict__, _has_tasks()
        _HERE.set((*_HERE.get(), choice))
        if not in_tasks:
            _THREAD.chosen = (*_THREAD.chosen, choice)
        self._count(1, in_tasks)
        try:
            yield
        finally:
            self._count(-1, in_tasks)
            # not what was there before: generators may end their choices in another order, and in another thread
            thread["chosen"] = _without(thread["chosen"], choice)
            _HERE.set(_without(_HERE.get(), choice))

    def _count(self, by: int, in_tasks: bool) -> None:
        with _COUNTING:
            self._opened += by
            self._in_tasks += by * in_tasks
            self.is_open, self.in_tasks = self._opened > 0, self._in_tasks > 0

    def __getstate__(self) -> dict[str, Any]:
        closed = {"is_open": False, "in_tasks": False, "_opened": 0, "_in_tasks": 0}
        return {**vars(self), **closed}  # a copy is nobody's yet

    def renamed(self, names: Mapping[str, str | None]) -> None:
        """Call adapters otherwise, or, where the new name is None, forget them; what is used stays so."""
        pairs = [(names.get(name, name), weight) for name, weight in self.everywhere.weights]
        self.names = tuple(new for name in self.names if (new := names.get(name, name)) is not None)
        self.everywhere = Selection(tuple((name, weight) for name, weight in pairs if name is not None))
        invoked = {names.get(name, name): tokens for name, tokens in self.invocations.items()}
        self.invocations = {name: tokens for name, tokens in invoked.items() if name is not None}

    def __deepcopy__(self, _memo: object) -> "Switch":
        switch = self.fixed()
        if switch.everywhere.rows is not None:  # of one batch, which a copy outlives
            switch.everywhere = replace(self.everywhere, tokens=EVERYWHERE if switch.everywhere.tokens else None)
        return switch

    def act_everywhere(self) -> None:
        """Let adapters with an invocation act on every token for now, where something is compared with the forward."""
        if self.everywhere.tokens is not None:
            self.everywhere = replace(self.everywhere, tokens=EVERYWHERE)

    def fixed(self) -> "Switch":
        """Return a switch of its own for what this thread uses, for a copy, which other threads may run."""
        switch = Switch(self.names)
        switch.everywhere, switch.whole, switch.invocations = self.now(), self.whole, dict(self.invocations)
        switch.additions = self.additions
        return switch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _asked_outside(switch: Switch) -> Selection:
    """Return what this thread uses, in the middle of code that torch.compile makes: it knows no context variables."""
    return switch.of_thread()


class _Thread(threading.local):
    """What a thread uses, once more: for a compiler, which looks into a threading.local at each call of what it made.

    A value of the class, in place of each thread's own, it would take for a constant.
    """

    def __init__(self) -> None:
        self.chosen: tuple[_Choice, ...] = ()


_THREAD = _Thread()


def _has_tasks() -> bool:
    """Whether this thread runs tasks by turns, each of which has choices of its own."""
    try:
        return asyncio.get_running_loop() is not None
    except RuntimeError:
        return False


_COUNTING = threading.Lock()


def is_apart() -> bool:
    """Whether this thread uses other adapters for some rows or tokens of a model's call than for others."""
    return any(one.selection.is_apart for one in _HERE.get())


@contextlib.contextmanager
def acting_everywhere() -> Iterator[None]:
    """Let adapters with an invocation act on every token for a while, in this thread: in runs that show or prove."""
    token = _EVERYWHERE.set(True)
    try:
        yield
    finally:
        _EVERYWHERE.reset(token)


def acts_everywhere() -> bool:
    """Whether adapters with an invocation act on every token in this thread."""
    return _EVERYWHERE.get()


def rows_here() -> Iterator[AdapterRows]:
    """Yield the rows that hold in this thread, those that were chosen last first."""
    met: set[Switch] = set()
    for one in reversed(_HERE.get()):
        if one.switch not in met and one.selection.rows is not None:
            yield one.selection.rows
        met.add(one.switch)


@contextlib.contextmanager
def switched_off(things: Iterable[object]) -> Iterator[None]:
    """Let this thread, and no other, do without these objects for a while: they ask `is_off`."""
    off = _Off(id(thing) for thing in things)
    _OFF.set((*_OFF.get(), off))
    try:
        yield
    finally:
        _OFF.set(tuple(one for one in _OFF.get() if one is not off))


def is_off(thing: object) -> bool:
    """Whether this thread does without the object."""
    return any(id(thing) in off for off in _OFF.get())


class _Off(frozenset[int]):
    """What a thread does without: an object of its own for each time, as two may be of the same things."""


_OFF: ContextVar[tuple[_Off, ...]] = ContextVar("lora_fx_switched_off", default=())
_HERE: ContextVar[tuple[_Choice, ...]] = ContextVar("lora_fx_selections", default=())
"""What this thread uses of which models for a while; the last choice for a model holds."""
_EVERYWHERE: ContextVar[bool] = ContextVar("lora_fx_acting_everywhere", default=False)
_KEPT = "lora_fx_selections"
"""Attribute of a checkpointed call: what it used of which models, for when it is made again."""
