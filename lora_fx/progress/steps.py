"""What a call is doing, told where it is done and heard by whoever made the call.

A context variable holds the step that the running call is at, so no function has to hand one down:
`with step("adapting", len(sites), "sites") as doing:` around the work, `doing.advance()` after each.  Where nobody
listens that is a look at a variable.  A thread, and so a call in it, has a variable of its own.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar, Token
from typing import Protocol, TypeAlias

from lora_fx.progress.terminal import shown

PARTS = 1000
"""What a call counts in that has no unit of its own: its thousandths."""
_LIKELY = 0.9
"""The share of what is left that a step takes in one whose number of steps is not known."""


class Progress(Protocol):
    """Is called with what is done, how much there is to do in all, and what is being done.

    `done` never falls and ends at `total`, unless the call ends in an error.  Both are bytes for `merge_checkpoint`,
    and thousandths of the call for all else.  What it raises ends the call.
    """

    def __call__(self, done: int, total: int, what: str, /) -> object: ...


ShowProgress: TypeAlias = bool | Progress | None
"""None: a line on a terminal, once a call takes long; True: always, False: never; or who is told instead."""


class Stage:
    """A step of a call, which tells nobody."""

    __slots__ = ()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, doing: str = "") -> None:
        """Note that one more is done; `doing` names the one at hand."""

    def reach(self, done: int, doing: str = "") -> None:
        """Note how many are done; fewer than before change nothing."""


_SILENT = Stage()
_CURRENT: ContextVar[Stage | None] = ContextVar("lora_fx_step", default=None)


class _Listener:
    """The one whom a call tells."""

    __slots__ = ("_failure", "_told", "_whom")

    def __init__(self, whom: Progress) -> None:
        self._whom = whom
        self._told = (-1, "")
        self._failure: Exception | None = None

    def tell(self, share: float, what: str = "") -> None:
        """Pass on which share of the call is done, 0 to 1, if it is news.

        What it raises may be swallowed on the way, by the forward of a model that may fail; so it is raised again.
        """
        if self._failure is not None:
            raise self._failure
        done, what = max(self._told[0], int(share * PARTS + 1e-6)), what or self._told[1]
        if (done, what) == self._told:
            return
        self._told = (done, what)
        try:
            self._whom(done, PARTS, what)
        except Exception as error:
            self._failure = error
            raise


class _ToldStage(Stage):
    """A step of a call that somebody listens to: a share of it, from `_low` to `_high`."""

    __slots__ = ("_at", "_doing", "_high", "_left", "_listener", "_low", "_mark", "_parent", "_token", "_what", "done",
                 "total", "unit")  # fmt: skip

    def __init__(
        self, parent: "_ToldStage | _Listener", what: str, total: int | None, unit: str, share: float, calls: bool
    ) -> None:
        self._parent = parent
        self._listener: _Listener = parent if isinstance(parent, _Listener) else parent._listener
        self._low, self._high = (0.0, 1.0) if isinstance(parent, _Listener) else parent._next(share)
        self._at, self._what, self._doing = self._low, what, ""
        self._left = float(total or 0)
        self.done, self.total, self.unit = 0, total, unit
        self._mark = 0 if calls else -1
        self._token: Token[Stage | None] | None = None

    def __enter__(self) -> Stage:
        self._tell()  # may raise: nothing is begun then
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        if error[0] is None:
            self._at = self._high
            if isinstance(self._parent, _ToldStage):
                self._parent._at = max(self._parent._at, self._high)
            self._listener.tell(self._high)

    def advance(self, doing: str = "") -> None:
        self.reach(self.done + 1, doing)

    def reach(self, done: int, doing: str = "") -> None:
        self._mark = done if self._mark >= 0 else -1
        self._count(done, doing)

    def called(self, number: int, doing: str) -> None:
        """Note that a run has come to its so many-th block; only in steps that count calls of blocks."""
        if self._mark >= 0:
            self._count(self._mark + number, doing)

    def leave_out(self, share: float) -> None:
        """Let the steps that are left share what is left."""
        self._left = max(self._left - share, 0.0)

    def _count(self, done: int, doing: str) -> None:
        self.done, self._doing = max(self.done, done), doing
        if self.total is None:
            self._at = self._next(1.0)[1]
        elif self.total:
            self.done = min(self.done, self.total)
            self._at = max(self._at, self._low + (self._high - self._low) * self.done / self.total)
        self._tell()

    def _next(self, share: float) -> tuple[float, float]:
        """Return from where to where the next step inside of this one goes."""
        part = _LIKELY if self.total is None else 1.0 if share >= self._left else share / self._left
        self.leave_out(share)
        return self._at, self._at + (self._high - self._at) * part

    def _tell(self) -> None:
        if not self._what:
            return
        what = f"{self._what} {self._doing}" if self._doing else self._what
        self._listener.tell(self._at, f"{what}, {self.done} of {self.total} {self.unit}" if self.unit else what)


def step(what: str = "", total: int | None = 1, unit: str = "", share: float = 1.0, calls: bool = False) -> Stage:
    """Return a context in which the running call does something; it does not say so where nobody listens.

    Args:
        what: is done; empty for what only has steps inside of it.
        total: how many there are, of the things that it counts or the shares of the steps in it; None if nobody knows.
        unit: what they are called, if they are to be shown.
        share: how many of the enclosing step's things it is.
        calls: whether runs of a model are counted in it, block by block, by `block_called`.
    """
    current = _CURRENT.get()
    return _ToldStage(current, what, total, unit, share, calls) if isinstance(current, _ToldStage) else _SILENT


def left_out(share: float) -> None:
    """Note that a step of so many shares of the step at hand is not needed this time."""
    current = _CURRENT.get()
    if isinstance(current, _ToldStage):
        current.leave_out(share)


def block_called(number: int, path: str) -> None:
    """Note that a run of the model has come to this block, the so many-th (from 0), and will take its time there."""
    current = _CURRENT.get()
    if isinstance(current, _ToldStage):
        current.called(number, path)


@contextlib.contextmanager
def running(name: str, progress: ShowProgress, total: int | None = 1, clock: bool = True) -> Iterator[None]:
    """Let the steps inside be told as `progress` says; a call within another one is a step of that.

    Args:
        name: of the call, for the line.
        progress: as for `lora_fx.plan`.
        total: the shares of its steps, together; None if nobody knows.
        clock: whether a thread keeps the seconds of the line running; without it, nothing runs beside the steps.
    """
    outer = _CURRENT.get()
    if progress is None and outer is not None:
        with step(name, total):
            yield
        return
    with shown(name, progress, clock) as whom:
        if whom is None:
            token = _CURRENT.set(_SILENT)
            try:
                yield
            finally:
                _CURRENT.reset(token)
            return
        with _ToldStage(_Listener(whom), "", total, "", 1.0, False):
            yield


def ignored(done: int, total: int, what: str, /) -> None:
    """Listen to nothing: the Progress of a call that nobody watches."""


@contextlib.contextmanager
def counting(name: str, progress: ShowProgress) -> Iterator[Progress]:
    """Give what is to be told (done, total, what) in units of the call's own, and shows it as `progress` says."""
    with shown(name, progress, clock=True) as whom:
        yield ignored if whom is None else whom
