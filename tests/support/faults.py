"""Faults at any line: work that an exception ends in the middle, and what a model and the process were before and are after."""

from __future__ import annotations

import ast
import functools
import hashlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.adapters.dicts import KEPT, KEPT_TARGETS
from lora_fx.passes.editor import Editor

FAULTS: tuple[type[BaseException], ...] = (RuntimeError, MemoryError, KeyboardInterrupt)
_OURS = str(Path(lora_fx.__file__).parent)


@functools.cache
def _cleaning(path: str) -> frozenset[int]:
    """Return the lines of a file that Python itself does not protect: `with`, which is left again, `try`, `finally`."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.With):
            found |= {node.lineno, *(item.context_expr.lineno for item in node.items)}
        elif isinstance(node, ast.Try):
            found |= {node.lineno}  # no exception arises there, and the `with` around it would not end
            found |= {line for part in node.finalbody for line in range(part.lineno, (part.end_lineno or 0) + 1)}
        elif isinstance(node, ast.FunctionDef) and node.name == "__exit__":
            found |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    return frozenset(found)


class _Counter:
    """Counts lines of lora_fx that run, in all threads, and raises at one of them, or at the next that cleans nothing up."""

    def __init__(self, at: int | None, fault: type[BaseException]) -> None:
        self.count, self.at, self.fault = 0, at, fault
        self.place = ""

    def traced(self, frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        if event == "line":
            self.count += 1
            is_due = self.at is not None and self.count >= self.at and not self.place
            if is_due and frame.f_lineno not in _cleaning(frame.f_code.co_filename):
                self.place = f"{frame.f_code.co_filename.removeprefix(_OURS)[1:]}:{frame.f_lineno}"
                raise self.fault("a fault for a test")
        return self.traced


def lines(work: Callable[[], object]) -> int:
    """Return how many lines of lora_fx some work runs."""
    return _run(work, _Counter(None, RuntimeError)).count


@dataclass(frozen=True, slots=True)
class Met:
    """Where a fault was raised."""

    place: str
    """File and line; empty if the work ended before."""
    ended: bool
    """Whether it ended the work: what is tried, and given up where it fails, catches it."""


def ends_at(line: int, work: Callable[[], object], fault: type[BaseException]) -> Met:
    """Do some work, with a fault when so many lines of lora_fx have run."""
    counter = _Counter(line, fault)
    try:
        _run(work, counter)
    except BaseException as error:
        if not counter.place:
            raise AssertionError("the work itself fails") from error
        return Met(counter.place, True)
    return Met(counter.place, False)


def _run(work: Callable[[], object], counter: _Counter) -> _Counter:
    before = sys.gettrace()
    threading.settrace(counter.traced)
    sys.settrace(counter.traced)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    finally:
        sys.settrace(before)
        threading.settrace(before)  # type: ignore[arg-type]
    return counter


def ends_at_edit(edit: int, work: Callable[[], object], fault: type[BaseException]) -> bool:
    """Do some work that a fault ends behind an edit of a graph; whether there were so many."""
    left, noted = [edit], Editor._note

    def note(self: Editor, *args: Any) -> None:
        noted(self, *args)
        left[0] -= 1
        if left[0] < 0:
            raise fault("a fault for a test")

    Editor._note = note  # type: ignore[method-assign]
    try:
        work()
    except BaseException as error:
        if left[0] >= 0:
            raise AssertionError("the work itself fails") from error
        return True
    finally:
        Editor._note = noted  # type: ignore[method-assign]
    return left[0] < 0


# -- what there is


def portrait(model: nn.Module) -> dict[str, object]:
    """Return all that a model is: its modules' classes and attributes, every tensor with its bits, hooks, graphs."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[path] = (id(module), type(module), module.training, *_attributes(module))
        if isinstance(module, fx.GraphModule):
            seen[f"{path}: graph"] = (
                module.code,
                [(node.op, str(node.target), node.name) for node in module.graph.nodes],
            )
    return seen


def _attributes(module: nn.Module) -> Iterator[object]:
    for name, value in sorted(vars(module).items()):
        if name in ("_graph", KEPT, KEPT_TARGETS):
            continue  # of a graph the nodes are compared; what a swap keeps for the next one changes nothing
        if name in ("_parameters", "_buffers"):
            yield name, [(key, _tensor(tensor)) for key, tensor in value.items()]
        elif name == "_modules":
            yield name, [(key, id(child)) for key, child in value.items()]
        elif isinstance(value, Tensor):
            yield name, _tensor(value)
        elif isinstance(value, dict):
            yield name, [(str(key), _plain(one)) for key, one in value.items()]
        else:
            yield name, _plain(value)


def _plain(value: object) -> object:
    is_value = isinstance(value, int | float | str | bool | tuple | type(None)) or is_dataclass(value)
    return value if is_value and type(value).__hash__ is not None else id(value)


def _tensor(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    grad = None if tensor.grad is None else id(tensor.grad)
    return id(tensor), tensor.requires_grad, tensor.shape, hashlib.sha256(content).hexdigest(), grad


def surroundings() -> dict[str, object]:
    """Return what of the process some work might leave changed."""
    return {
        "threads": torch.get_num_threads(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "patched": (
            torch.autograd.Function.apply,
            nn.Module.__call__,
            nn.Module.__getattr__,
            torch.nn.functional.linear,
        ),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),  # type: ignore[attr-defined]
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
    }
