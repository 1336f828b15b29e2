"""An adapted model → the program that torch.export makes of it, with names for what goes in and comes out."""

import contextlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from lora_fx.errors import ExportError, LoraFxWarning
from lora_fx.exporters.clients import Both, outputs
from lora_fx.exporters.running import call_with, without_and_with
from lora_fx.exporters.target import FEATURES, Ability, Refusal, refusals
from lora_fx.models.offload import offloaded_in
from lora_fx.models.samples import Sample
from lora_fx.models.swap import Swapped, swap
from lora_fx.progress.steps import step
from lora_fx.text import listing

EVERY_FEATURE: dict[str, Ability] = {
    **dict.fromkeys(FEATURES, "yes"),
    **dict.fromkeys(("slices", "alphas", "rslora"), "exact equivalent"),
    "tokens": "refused",
    "invocation": "refused",
}
"""What a program of the whole model expresses; the scaling is in B, and rows that are not of a part are zero there."""
EXPERTS = "where it is transformers' experts: load the model with experts_implementation='batched_mm'"


_NOT_IN_PROGRAMS = {
    "tokens": "which rows they are would be fixed in the program, for all adapters; target='merged' has them",
    "invocation": "a program acts alike on every token, and looks for no invocation; target='peft' has it",
}
_AWAY = "accelerate offloads its weights, and a program holds them: load the adapter beside a base that is whole"


def refused_by_programs(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what no program of a whole model expresses, and for weights that are not here."""
    yield from refusals(tuned, _NOT_IN_PROGRAMS)
    yield from ((path, _AWAY) for path in itertools.islice(offloaded_in(tuned), 8))


class PlainOutputs(Swapped, nn.Module):
    """Mixin for a model that is exported: it returns tensors in tuples and dicts, which every client knows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return plain(super().forward(*args, **kwargs))


def plain(value: Any) -> Any:
    """Return the tensors of an output: a transformers output as a dict, without what is not a tensor (caches)."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        kept = {str(key): plain(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, (tuple, list)):
        return tuple(item for item in map(plain, value) if item is not None)
    return None


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for every tensor in tuples, lists and dicts: `hidden_states_0`, `logits`."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, (Mapping, tuple, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from named_tensors(item, f"{name}_{key}" if name else _word(key))


def _word(key: object) -> str:
    return f"output_{key}" if isinstance(key, int) else str(key)


def call_of(model: nn.Module, sample: Sample) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the sample with positional arguments as keywords, as far as the model's forward has names for them."""
    bound = inspect.signature(model.forward).bind(*sample.args, **sample.kwargs)
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    if any(kinds[name] is not inspect.Parameter.POSITIONAL_OR_KEYWORD for name in bound.arguments):
        return sample.args, dict(sample.kwargs)
    return (), dict(bound.arguments)


def input_tensors(model: nn.Module, sample: Sample) -> dict[str, Tensor]:
    """Return the tensors that go into the model, by name, in order."""
    args, kwargs = call_of(model, sample)
    numbered = {f"input_{number}": value for number, value in enumerate(args)}
    return dict((*named_tensors(numbered), *named_tensors(kwargs)))


def exported(target: str, model: nn.Module, sample: Sample, bounded: bool = False) -> ExportedProgram:
    """Return what torch.export makes of the model, with every size dynamic that torch does not fix by itself.

    With `bounded`, the sizes of the sample are the largest.

    Raises:
        ExportError: torch.export cannot trace the model.
    """
    if not isinstance(model, fx.GraphModule):
        swap(model, PlainOutputs)
    args, kwargs = call_of(model, sample)
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for _, tensor in named_tensors((args, kwargs)):
        shapes[tensor] = {axis: _dynamic(size, bounded) for axis, size in enumerate(tensor.shape)}
    with torch.no_grad(), step("tracing"), converting(target, "torch.export cannot trace the model", EXPERTS):
        dynamic = shapes.dynamic_shapes(model, args, kwargs)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    _warn_of_ones(target, args, kwargs)
    return program


def _dynamic(size: int, bounded: bool) -> Any:
    return Dim.AUTO(max=size) if bounded and size > 1 else Dim.AUTO


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of what torch and the model warn of while they are traced and converted."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


@contextlib.contextmanager
def converting(target: str, failure: str, advice: str = "") -> Iterator[None]:
    """Say nothing, as `quiet`; whatever somebody's forward or a converter raises is an ExportError that says why."""
    try:
        with quiet():
            yield
    except Exception as error:
        raise ExportError(target, failure, [as_fact(error)], advice) from error


def plain_outputs_of_both(tuned: nn.Module, sample: Sample) -> Both:
    """Return what is left of the outputs in an exported model, without the adapters, and with them."""

    def model(*args: Any, **kwargs: Any) -> Any:
        return plain(tuned(*args, **kwargs))

    return without_and_with(tuned, lambda: outputs(model, call_with(sample)))


def output_names(model: nn.Module, sample: Sample) -> list[str]:
    """Return the names of the tensors that the model gives back, in order."""
    with torch.no_grad():
        return [name for name, _ in named_tensors(plain(model(*sample.args, **sample.kwargs)))]


def as_fact(error: BaseException) -> tuple[str, str]:
    """Return an error as a fact: its type, and the first line of what it says."""
    while error.__cause__ is not None:  # what torch.onnx says first is how to report an error
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return type(error).__name__, lines[0][:300]


def _warn_of_ones(target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Torch takes a size of 1 for a constant."""
    ones = [name for name, tensor in named_tensors(kwargs or args) if 1 in tensor.shape]
    if ones:
        warnings.warn(
            f"{target}: the example input {listing(ones)} has a size of 1, which torch.export takes for a constant; "
            "give an example with sizes of 2 or more where the size may change",
            LoraFxWarning,
            stacklevel=2,
        )
