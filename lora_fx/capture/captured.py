"""Capture: one submodule and one real call → a graph, and everything that the graph relies on."""

import enum
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from lora_fx.capture.calls.ambient import AmbientState, ambient_state, in_clean_thread
from lora_fx.capture.calls.arguments import FlatCall, GuardCheck, Leaf, flatten, is_constant, positional_names, rebuild
from lora_fx.capture.calls.objects import copied, is_plain_object
from lora_fx.capture.calls.reasons import Untraceable, reason_of
from lora_fx.capture.reads.dependencies import Dependencies
from lora_fx.capture.reads.opennumbers import OpenNumbers, UsedOtherwise
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.inputs import Input, Inputs, VaryingSizes
from lora_fx.capture.tracing.outputs import write_output
from lora_fx.capture.tracing.recording import NeedsRecord, Records
from lora_fx.capture.tracing.tracer import Specialised, Tracer
from lora_fx.models.code import refuse_odd_names
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import attribute_at
from lora_fx.models.torch_internals import Fakes, quiet_fakes

_Found = TypeVar("_Found")
_LOCK = threading.RLock()
_MOST_RESTARTS = 24


class NotCaptured(Exception):
    """This call of this submodule cannot be captured; the text is the reason.  An outcome: the module runs as it is."""


class BakesSize(NotCaptured):
    """The forward itself turns a size that is known to vary into a constant."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A submodule's forward as a graph, with call_module nodes for its leaves, and what the graph relies on."""

    graph: fx.Graph
    inputs: tuple[Input, ...]
    """What the guard finds and the graph is given; the first ones are the `tensors` arguments of the call."""
    tensors: int
    same: tuple[tuple[str, str], ...]
    """Pairs of accesses that gave one and the same tensor."""
    constants: tuple[Leaf, ...]
    structure: tuple[GuardCheck, ...]
    size_guards: tuple[str, ...]
    """Expressions over `s<input>_<dimension>`."""
    dependencies: Dependencies
    ambient: AmbientState | None
    """None: does not matter to the graph."""
    owned: dict[str, tuple[str, torch.Size, torch.dtype, torch.device]]
    """Of the module's own tensors that the graph reads or the forward asked about: where each stands, and facts."""
    parameters: tuple[AttributePath, ...]
    """Integers of the module that accesses use as an index, as `[«place»]`: the layer's number in a KV cache."""
    example: tuple[tuple[Any, ...], dict[str, Any]] | None
    """The captured call with meta tensors: enough to capture the same call of another model."""


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: VaryingSizes = frozenset(),
    record: Callable[[], Records] | None = None,
    left_open: frozenset[AttributePath] = frozenset(),
) -> Captured:
    """Return the forward of the module for calls like this one, as a graph; module and arguments stay unchanged.

    Args:
        module: the submodule; its forward runs on a private copy, with fake tensors.
        args: positional arguments of a real call; only facts about them are used, not their values.
        kwargs: keyword arguments.
        varying: sizes that are known to vary; a part of the forward that turns one into a constant stays a call.
        record: makes the same call for real and returns what the submodules returned; asked at most once, for those
            that cannot run on fake tensors.
        left_open: places of integers of the module that the graph shall have as parameters, if the forward uses them as
            no more than an index.

    Raises:
        NotCaptured: with the reason.
    """
    call = _call(module, args, kwargs, varying)

    def work() -> Captured:
        found = _left_open(call, record, left_open) if left_open else None
        return found if found is not None and not found.dependencies.retreats else _with_retreats(call, record)

    return _worked(call, work)


def capture_open(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    varying: VaryingSizes,
    record: Callable[[], Records] | None,
    left_open: frozenset[AttributePath],
) -> Captured | None:
    """Return what `capture` does if the forward uses the integers as no more than an index, else None.

    What is a call in it (`dependencies.retreats`) may be one for being given stand-ins: a capture without tells.
    """
    call = _call(module, args, kwargs, varying)
    return _worked(call, lambda: _left_open(call, record, left_open))


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], varying: VaryingSizes) -> "_Call":
    flat = flatten(args, kwargs, positional_names(original_class(module).forward)[1:])
    refuse_opaque(flat)
    return _Call(module, args, kwargs, flat, varying, ambient_state({leaf.value.device for leaf in flat.tensors()}))


def _worked(call: "_Call", work: Callable[[], _Found]) -> _Found:
    def around() -> _Found:
        with call.around.active():
            return work()

    with _LOCK, quiet_fakes():
        return in_clean_thread(around)


def refuse_opaque(flat: FlatCall) -> None:
    """Refuse a call with arguments that cannot be copied or compared: a generator, a lock, an open file.

    Raises:
        NotCaptured: naming the argument.
    """
    for leaf in flat.leaves:
        if not _is_transparent(leaf.value):
            raise NotCaptured(f"argument {leaf.name} is of type {type(leaf.value).__name__}")
        if isinstance(leaf.value, Tensor) and type(leaf.value) not in (Tensor, nn.Parameter):
            raise NotCaptured(f"argument {leaf.name} is of the tensor subclass {type(leaf.value).__name__}")


def _is_transparent(value: object) -> bool:
    if isinstance(value, FunctionType):
        return "<" not in value.__qualname__  # a lambda or inner function is likely to be another one at the next call
    if isinstance(value, (type, BuiltinFunctionType, enum.Enum)):
        return True
    return isinstance(value, Tensor) or is_constant(value) or is_plain_object(value)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is captured."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flat: FlatCall
    varying: VaryingSizes
    around: AmbientState
    left_open: frozenset[AttributePath] = frozenset()

    def captured(self, opaque: Mapping[str, str], records: Records | None) -> Captured:
        """Make one attempt."""
        tracer = Tracer(self.module, Fakes(), opaque, records)
        writer = tracer.writer
        inputs = Inputs(tracer.fakes, writer, lambda: tracer.listening, tracer.paused)
        tracer.proxies = inputs.proxies
        inputs.admit(self.flat)
        tensors = sum(isinstance(given.stand_in, Tensor) for given in inputs.given)
        tracer.varying = list(inputs.symbols(self.varying))
        tracer.open = tracer.globals.open = OpenNumbers(self.left_open, inputs.required)
        stand_ins = inputs.stand_ins
        result = tracer.run(*rebuild(self.args, self.kwargs, lambda leaf: stand_ins.get(id(leaf), leaf)))
        write_output(writer, result)
        if tracer.open.given and tracer.open.spoiled:
            raise UsedOtherwise
        writer.drop_unused()
        refuse_odd_names(writer.graph, paths=False)
        read = {str(node.target) for node in writer.graph.nodes if node.op == "get_attr"}
        return Captured(
            graph=writer.graph,
            inputs=inputs.inputs(),
            tensors=tensors,
            same=tuple(inputs.same),
            constants=tuple(inputs.constants),
            structure=(*self.flat.structure, *inputs.checks),
            size_guards=tuple(inputs.size_guards()),
            dependencies=tracer.dependencies,
            ambient=self.around,
            owned={name: _facts(tracer.module, name) for name in sorted(tracer.dependencies.owned | read)},
            parameters=tuple(tracer.open.given),
            example=rebuild(self.args, self.kwargs, _stub),
        )


def _left_open(
    call: _Call, record: Callable[[], Records] | None, left_open: frozenset[AttributePath]
) -> Captured | None:
    """Return the capture with integers left open; None if the forward uses them otherwise, or fails."""
    try:
        return _with_retreats(replace(call, left_open=left_open), record)
    except (UsedOtherwise, NotCaptured):
        return None


def _with_retreats(call: _Call, record: Callable[[], Records] | None) -> Captured:
    """Capture; start again with a submodule as one opaque call where it bakes in a varying size or cannot be faked."""
    opaque: dict[str, str] = {}
    records: Records | None = None
    for _ in range(_MOST_RESTARTS):
        try:
            return call.captured(opaque, records)
        except Specialised as specialised:
            if not specialised.path or specialised.path in opaque:
                raise BakesSize("the forward turns a varying size into a constant") from None
            opaque[specialised.path] = "it turns a varying size into a constant"
        except NeedsRecord as needed:
            if record is None or needed.path in opaque:
                raise NotCaptured(needed.reason) from None
            opaque[needed.path] = needed.reason
        except (Untraceable, Exception) as error:
            raise NotCaptured(reason_of(error)) from error
        if records is None and record is not None:
            records = record()
    raise NotCaptured(f"more than {_MOST_RESTARTS} submodules cannot run on fake tensors of any size")


def _facts(module: nn.Module, name: str) -> tuple[str, torch.Size, torch.dtype, torch.device]:
    tensor = attribute_at(module, name)
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    table = next((slot for slot in ("_parameters", "_buffers") if last in vars(owner)[slot]), "__dict__")
    return (table, tensor.shape, tensor.dtype, tensor.device)


def _stub(value: Any) -> Any:
    return value if is_constant(value) else copied(value, _meta)


def _meta(value: Tensor) -> Tensor:
    stub = torch.empty_like(value, device="meta", memory_format=torch.preserve_format)
    return stub.requires_grad_(value.requires_grad)
