"""How a client is given its job, and gives back its result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIVEN, RESULT = "given.pt", "result.pt"


def run(work: Callable[[dict[str, Any]], Any]) -> None:
    """Do the work on what lies in the folder of the command line, and put the result beside it."""
    folder = Path(sys.argv[1])
    given = torch.load(folder / GIVEN, weights_only=False)  # our own parent process has written it
    torch.save(work(given), folder / RESULT)


def outputs(model: Callable[..., Any], sample: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor]:
    """Return the floating point tensors that a call of the model gives, in order."""
    args, kwargs = sample
    with torch.no_grad():
        return list(tensors(model(*args, **kwargs)))


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in an output: in tuples, lists, dicts and objects with attributes."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach().float().cpu()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
        for item in vars(value).values():
            yield from tensors(item)
