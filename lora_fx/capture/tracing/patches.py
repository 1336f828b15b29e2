"""What no torch mode hears: patches of torch, for as long as a capture runs; other threads pass through them."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks


class PatchListener(Protocol):
    """Hears what the patches see."""

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
    """Let the listener hear what its own thread does while it is listening, as long as the context is open.

    Args:
        listener: hears of custom autograd functions, of questions for grad mode and of hooks on saved tensors.
    """
    thread = threading.get_ident()

    def listening() -> bool:
        return threading.get_ident() == thread and listener.listening

    apply, enter = vars(torch.autograd.Function)["apply"], saved_tensors_hooks.__enter__
    is_grad_enabled, has_torch_function = torch.is_grad_enabled, torch.overrides.has_torch_function

    def heard_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        # a classmethod of Python's or, in newer torch, one written in C: both bind to a class like this
        call = functools.partial(apply.__get__(None, cls), *args, **kwargs)
        return listener.custom_function(cls, call, args) if listening() and not kwargs else call()

    def heard_grad_mode() -> bool:
        if listening():
            listener.asked_grad_mode()
        return is_grad_enabled()

    def heard_hooks(hooks: saved_tensors_hooks) -> None:
        if listening():  # a graph of what is checkpointed would save what checkpointing is there to drop
            listener.refuse("the forward sets hooks on saved tensors (activation checkpointing)")
        return enter(hooks)

    def nothing_overrides(args: Iterable[Any]) -> bool:
        # torch's attention layers choose kernels by it, and nothing overrides torch in the real call
        return not listening() and has_torch_function(args)

    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.autograd.Function, "apply", classmethod(heard_apply)),
            (torch, "is_grad_enabled", heard_grad_mode),
            (saved_tensors_hooks, "__enter__", heard_hooks),
            (torch.overrides, "has_torch_function", nothing_overrides),
        ):
            stack.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, replacement)
        yield
