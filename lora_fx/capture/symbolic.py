"""torch.fx's own symbolic tracing, without inputs, where it is provably safe.

A Proxy is wrong in silence wherever Python looks at it: `x is None`, `isinstance`, `hasattr`, `try`, a flag.  So only
straight-line code is accepted: every Python function that runs during the trace (torch's own apart) must have no
branch, loop, handler or unpacking in its bytecode, call no builtin and store no attribute.  Then nothing can come out
differently at the next call, whatever the inputs are.
"""

import dis
import sys
from collections.abc import Callable
from inspect import Parameter, signature
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lora_fx.capture.calls.ambient import no_collections
from lora_fx.capture.calls.arguments import GuardCheck, is_constant
from lora_fx.capture.calls.reasons import Untraceable, reason_of
from lora_fx.capture.captured import Captured, NotCaptured
from lora_fx.capture.reads.dependencies import Dependencies
from lora_fx.capture.reads.libraries import is_standard_library
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.copies import Listener, path_of, reporting_copy
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.capture.tracing.tracer import is_leaf
from lora_fx.models.code import refuse_odd_names
from lora_fx.models.layers import is_layer


def capture_symbolically(module: nn.Module) -> Captured:
    """Return the module's forward as a graph, without inputs; the module stays unchanged.

    Raises:
        NotCaptured: the forward is not straight-line code, or differs between train and eval mode.
    """
    names = _tensor_parameters(module)
    graph, dependencies = _trace(module, names, training=False)
    other, _ = _trace(module, names, training=True)
    if str(graph) != str(other):
        raise NotCaptured("train and eval mode give different graphs")
    inputs = tuple(
        TensorInput(f"args[{position}]", name, (), (), None, None, False, True) for position, name in enumerate(names)
    )
    structure = (
        GuardCheck(f"len(args) == {len(names)}", "number of positional arguments"),
        GuardCheck("not kwargs", "keyword arguments"),
    )
    return Captured(graph, inputs, len(inputs), (), (), structure, (), dependencies, None, {}, (), None)


def _tensor_parameters(module: nn.Module) -> list[str]:
    """Return the names of the forward's parameters, if all are plain and required."""
    parameters = signature(module.forward).parameters.values()
    plain = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in parameters:
        if parameter.kind not in plain or parameter.default is not Parameter.empty:
            raise NotCaptured(f"parameter {parameter.name} of the forward is optional")
    return [parameter.name for parameter in parameters]


def _trace(module: nn.Module, names: list[str], training: bool) -> tuple[fx.Graph, Dependencies]:
    tracer = _SymbolicTracer(module)
    for child in tracer.root.modules():
        object.__setattr__(child, "training", training)
    problems: list[str] = []
    try:
        proxies = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
        result = _watched(lambda: tracer.forward(proxies), problems)
        tracer.graph.output(tracer.create_arg(result))
        refuse_odd_names(tracer.graph, paths=False)
    except (Untraceable, Exception) as error:
        raise NotCaptured(problems[0] if problems else reason_of(error)) from error
    if problems:
        raise NotCaptured(problems[0])
    return tracer.graph, tracer.dependencies


class _SymbolicTracer(Listener, fx.Tracer):
    """A torch.fx.Tracer on a reporting copy: it patches nothing, and leaves are those of the other tracer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.listening = False
        self.dependencies = Dependencies()
        self.original = module
        self.root = reporting_copy(module, self)
        self.owned = {id(tensor): name for name, tensor in (*self.root.named_buffers(), *self.root.named_parameters())}
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.tensor_attrs: dict[Any, str] = {}

    def forward(self, proxies: list[fx.Proxy]) -> Any:
        self.listening = True
        try:
            with _OnlyProxies():
                return self.root.forward(*proxies)
        finally:
            self.listening = False

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = path_of(module)
        if is_leaf(module) or is_layer(module):  # a forward of a layer's own that cannot be traced would lose the block
            return self.create_proxy("call_module", path, args, kwargs)
        result = nn.Module.__call__(module, *args, **kwargs)
        self.dependencies.inlined.append(path)
        return result

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise Untraceable("the forward uses a tensor that is not a parameter")
        return super().create_arg(a)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        node.meta["place"] = ""
        return node

    def absent(self, place: AttributePath) -> None:
        raise Untraceable(f"the forward asks whether {place} exists")

    def wrote(self, place: AttributePath) -> None:
        raise Untraceable(f"the forward writes {place} to the module")


class _OnlyProxies(TorchFunctionMode):
    """Refuses torch functions that compute on anything other than proxies: their result would be a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(issubclass(kind, fx.Proxy) for kind in types):
            raise Untraceable(f"the forward calls {func.__name__} on no input")
        return func(*args, **(kwargs or {}))


def _watched(work: Callable[[], Any], problems: list[str]) -> Any:
    """Return what `work` returns; note every Python function run on the way that is not straight-line code."""
    seen: set[CodeType] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code not in seen:
            seen.add(frame.f_code)
            problem = None if _is_ours_or_torchs(frame) else problem_of(frame.f_code, frame.f_globals)
            if problem is not None:
                problems.append(problem)

    before = sys.getprofile()
    with no_collections():
        sys.setprofile(watch)
        try:
            return work()
        finally:
            sys.setprofile(before)


def _is_ours_or_torchs(frame: FrameType) -> bool:
    home, file = str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename
    return home.split(".")[0] in ("torch", "lora_fx") or is_standard_library(file)


_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR")
_BRANCHES = ("JUMP", "FOR_ITER", "UNPACK", "IS_OP", "COMPARE_OP", "CONTAINS_OP", "YIELD", "SEND", "IMPORT", "WITH")


def problem_of(code: CodeType, scope: dict[str, Any]) -> str | None:
    """Return why a function is not straight-line code, or None if it is."""
    where = f"{code.co_name} (line {code.co_firstlineno})"
    if code.co_exceptiontable:
        return f"{where} has a with, try or generator"
    for instruction in dis.get_instructions(code):
        if instruction.opname in _STORES:
            return f"{where} stores into an object"
        if any(part in instruction.opname for part in _BRANCHES):
            return f"{where} has a branch, loop, comparison or unpacking"
        if instruction.opname == "LOAD_GLOBAL" and not _is_harmless(scope.get(instruction.argval, _BUILTIN)):
            return f"{where} uses {instruction.argval}"
    return None


_BUILTIN = object()


def _is_harmless(value: object) -> bool:
    """Whether straight-line code may use the global: torch, Python functions (they are watched too), constants."""
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] in ("torch", "math", "operator")
    home = value.__module__ if isinstance(value, (BuiltinFunctionType, type)) else ""
    return isinstance(value, FunctionType) or is_constant(value) or str(home).startswith("torch")
