"""Parameters and buffers by dotted name."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_fx.models.wrappers import inside, module_at
from lora_fx.text import dotted as dotted


def _slot(model: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """Return the table that holds the parameter or buffer, and its name there."""
    path, _, last = name.rpartition(".")
    owner = inside(module_at(model, path))
    tables: tuple[dict[str, Tensor | None], ...] = (owner._parameters, owner._buffers)  # type: ignore[assignment]
    for table in tables:
        if last in table:
            return table, last
    raise KeyError(name)


def attribute_at(module: nn.Module, path: str) -> Any:
    """Return what a dotted path names, seen from the module: a submodule, a tensor or any other attribute.

    Raises:
        AttributeError: there is nothing of that name.
    """
    return functools.reduce(getattr, path.split("."), module)


def get_tensor(model: nn.Module, name: str) -> Tensor | None:
    """Return the parameter or buffer of that dotted name.

    Raises:
        KeyError: there is none.
    """
    table, last = _slot(model, name)
    return table[last]


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put the tensor in place of the parameter or buffer of that name; what is tied to it keeps the old one."""
    table, last = _slot(model, name)
    table[last] = tensor


def own_parameters(model: nn.Module, names: Iterable[str], requires_grad: bool) -> None:
    """Give the parameters of these names memory of their own; those that are tied to each other stay so."""
    copies: dict[int, nn.Parameter] = {}
    for name in names:
        old = get_tensor(model, name)
        assert old is not None
        if id(old) not in copies:
            copies[id(old)] = nn.Parameter(old.detach().clone(), requires_grad=requires_grad)
        set_tensor(model, name, copies[id(old)])


@contextlib.contextmanager
def borrowed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model use other tensors for a while, as frozen parameters unless they are parameters themselves."""
    own: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
    for name, value in values.items():
        table, last = _slot(model, name)
        own.append((table, last, table[last]))
        is_new = isinstance(table[last], nn.Parameter) and not isinstance(value, nn.Parameter)
        table[last] = nn.Parameter(value, requires_grad=False) if is_new else value
    try:
        yield
    finally:
        for table, last, tensor in own:
            table[last] = tensor
