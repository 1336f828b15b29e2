"""What no torch mode is told of, heard by patches for as long as a capture runs; other threads are not affected."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks


class PatchListener(Protocol):
    """Who is told."""

    listening: bool

    def custom_function(self, function: type[torch.autograd.Function], call: Callable[[], Any], args: Any) -> Any:
        """A torch.autograd.Function is applied; `call` does it."""

    def asked_grad_mode(self) -> None:
        """The forward asked whether gradients are wanted."""

    def refuse(self, reason: str) -> None:
        """The forward does what a graph would lose."""


@dataclass(frozen=True, slots=True)
class CustomFunction:
    """A torch.autograd.Function as one node of a graph: its own backward stays."""

    function: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def patched(listener: PatchListener) -> Iterator[None]:
    """Tell the listener what its own thread does while it is listening."""
    thread = threading.get_ident()

    def listening() -> bool:
        return threading.get_ident() == thread and listener.listening

    with (
        _custom_functions(listener, listening),
        _grad_mode(listener, listening),
        _saved_tensors(listener, listening),
        _no_overrides(listening),
    ):
        yield


@contextlib.contextmanager
def _custom_functions(listener: PatchListener, listening: Callable[[], bool]) -> Iterator[None]:
    plain = vars(torch.autograd.Function)["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        def call() -> Any:
            return plain.__func__(cls, *args, **kwargs)

        return listener.custom_function(cls, call, args) if listening() and not kwargs else call()

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _grad_mode(listener: PatchListener, listening: Callable[[], bool]) -> Iterator[None]:
    plain = torch.is_grad_enabled

    def is_grad_enabled() -> bool:
        if listening():
            listener.asked_grad_mode()
        return plain()

    torch.is_grad_enabled = is_grad_enabled
    try:
        yield
    finally:
        torch.is_grad_enabled = plain


@contextlib.contextmanager
def _saved_tensors(listener: PatchListener, listening: Callable[[], bool]) -> Iterator[None]:
    plain = saved_tensors_hooks.__enter__

    def enter(hooks: saved_tensors_hooks) -> None:
        if listening():  # a graph of what is checkpointed would save what checkpointing is there to drop
            listener.refuse("the forward sets hooks on saved tensors (activation checkpointing)")
        return plain(hooks)

    saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_overrides(listening: Callable[[], bool]) -> Iterator[None]:
    """Let torch's attention layers see that nothing overrides torch, as in the real call: they choose kernels by it."""
    plain = torch.overrides.has_torch_function

    def has_torch_function(args: Iterable[Any]) -> bool:
        return not listening() and plain(args)

    torch.overrides.has_torch_function = has_torch_function
    try:
        yield
    finally:
        torch.overrides.has_torch_function = plain
