"""The one file that uses private torch interfaces; everything else uses the names below.

A new torch release that moves something is a change here and nowhere else: `tests/models/test_torch_internals.py` pins
what the package relies on.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import math
import operator
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource, LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.autograd import forward_ad
from torch.distributed._composable_state import _module_state_mapping as composed_states
from torch.fx.experimental.proxy_tensor import PreDispatchTorchFunctionMode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph_module import _CodeOnlyModule
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils.checkpoint import CheckpointFunction

__all__ = ["DispatchMode", "FakeTensor", "composed_states", "enter_autocast", "exit_autocast", "pytree"]

FunctionMode = PreDispatchTorchFunctionMode
"""Base for a mode that sees torch functions; torch tells this class, and only this, of autocast regions."""

set_grad_enabled = torch._C._set_grad_enabled
MODULE_CALLS = frozenset({nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__})
"""The code that runs from a call of a module to its return; its `self` is the module."""
shape_guard_names: dict[str, Any] = dict(SYMPY_INTERP)
"""The names that a shape guard's expression may use."""


def global_hook_tables() -> tuple[dict[int, Callable[..., Any]], ...]:
    """Return torch's tables of hooks that fire for every module."""
    return (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)


def function_modes() -> list[TorchFunctionMode]:
    """Return the modes that see torch functions in this thread."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def without_function_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """Take the mode off this thread for a while, with those that were entered after it."""
    above: list[TorchFunctionMode] = []
    while not above or above[-1] is not mode:
        above.append(_pop_mode())  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for taken in reversed(above):
            _push_mode(taken)  # type: ignore[no-untyped-call]


def in_backward() -> bool:
    """Whether autograd's engine runs this thread: what is computed now is computed again, for a gradient."""
    return torch._C._current_graph_task_id() != -1


def is_tensor_function(function: object) -> bool:
    """Whether it is one of the methods of Tensor that torch has written in Python."""
    return inspect.isfunction(function) and function.__module__ == "torch._tensor"


def is_transform(function: object) -> bool:
    """Whether it is a part of torch.func's transformations (vmap, grad): some releases show it to a function mode."""
    return str(getattr(function, "__module__", "")).startswith("torch._functorch")


def uncompiled_if_stale() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs uncompiled where it may not see that a module was changed.

    torch 2.9 checks a module's attributes by the versions of dictionaries, which Python 3.13 does not count up.
    """
    dynamo = sys.modules.get("torch._dynamo")
    is_stale = dynamo is not None and getattr(dynamo.config, "use_recursive_dict_tags_for_guards", False)
    return torch.compiler.set_stance("force_eager") if is_stale else contextlib.nullcontext()


def aot_inductor() -> Any:
    """Return the module with `aoti_compile_and_package`, documented under this name; imported when it is needed."""
    return importlib.import_module("torch._inductor")


_T = TypeVar("_T")


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let torch.compile, when it is first given this tensor, make code for every size of one dimension."""
    torch._dynamo.mark_dynamic(tensor, dim)


CompilerError: type[Exception] = torch._dynamo.exc.TorchDynamoException
"""What torch.compile raises where it can make no code; nothing has been computed then."""


def inductor(graph_module: fx.GraphModule, example_inputs: Any) -> Any:
    """Return the code that torch.compile's own backend makes of a graph.

    Random numbers are drawn by torch's own generators, as without a compiler.
    """
    compile_fx = importlib.import_module("torch._inductor.compile_fx").compile_fx
    return compile_fx(graph_module, example_inputs, config_patches={"fallback_random": True})


def keeping_what_is_saved(backend: Callable[[], _T]) -> _T:
    """Return what a backend makes in torch.compile, whose backward pass may then be made more than once.

    Else its memory is used again by the first one (donated buffers), and torch refuses `retain_graph=True`.  What our
    operators read in the backward pass may be made again for them, which torch would rather keep.
    """
    with torch._functorch.config.patch(donated_buffer=False, ban_recompute_materialized_backward=False):
        made = backend()
    facts = getattr(torch._guards.TracingContext.try_get(), "fw_metadata", None)
    if facts is not None:
        facts.bw_donated_idxs = []  # torch 2.13 leaves None, and takes that for some
    return made


def deepcopy(value: _T, memo: dict[int, Any] | None = None) -> _T:
    """Return a deep copy; torch 2.13 warns, when a graph of torch.export is copied, of a class that it made itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return copy.deepcopy(value, memo)


_LOCAL = re.compile(r"L\['(\w+)'\]")


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Keep modes that follow operations from those of ours that are no part of the user's work."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep torch from logging every failure of a fake tensor: here a failure is an outcome, with a reason."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class Fakes:
    """Fake tensors with symbolic sizes, and what has been assumed of the sizes since."""

    def __init__(self) -> None:
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # to fill it takes longer than what one run of one block asks of it

    def tensor(self, like: Tensor, name: str, static: Sequence[bool]) -> Tensor:
        """Return a fake of `like`; dimensions that are not `static` get symbolic sizes.

        Also works in the middle of a capture: no mode sees what is done here.
        """
        sizes = [DimDynamic.STATIC if is_static else DimDynamic.DYNAMIC for is_static in static]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        with without_modes():
            detached = like.detach().requires_grad_(like.requires_grad)
            fake: Tensor = self.mode.from_tensor(detached, symbolic_context=context, source=ConstantSource(name))
        return fake

    def number(self, value: int, name: str) -> torch.SymInt:
        """Return a symbolic integer that is `value` now."""
        source = ConstantSource(name)
        symbol = self.shapes.create_symbol(value, source, DimDynamic.DYNAMIC)
        number = self.shapes.create_symintnode(symbol, hint=value, source=source)
        assert isinstance(number, torch.SymInt)
        return number

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run torch on fakes.  The Python dispatcher is needed where meta kernels exist in Python only."""
        with self.mode, enable_python_dispatcher():
            yield

    def is_constant(self, symbol: sympy.Symbol) -> bool:
        """Whether the symbol has been turned into a number."""
        value = self.shapes.replacements.get(symbol)
        return value is not None and value.is_number

    def guards(self, sizes: Sequence[torch.SymInt], names: Sequence[str]) -> list[str]:
        """Return the Python expressions over the names of the sizes (in order) that must all hold."""
        if not sizes:
            return []
        sources = [LocalSource(name) for name in names]
        clauses = self.shapes.produce_guards(sizes, sources, ignore_static=False)
        return [_LOCAL.sub(r"\1", clause) for clause in clauses]


def symbol_of(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """Return the sympy expression of a symbolic number."""
    return size.node.expr


def hint_of(size: torch.SymInt) -> int:
    """Return the number that a symbolic size stood for when it was made."""
    hint: int = size.node.hint
    return hint


def constant_of(size: torch.SymInt | torch.SymFloat | torch.SymBool) -> int | float | bool | None:
    """Return the number that a symbolic number stands for, if it is known to be one."""
    if size.node.constant is not None:
        constant: int | float | bool = size.node.constant
        return constant
    expression = size.node.expr
    if not (expression.is_number or expression in (sympy.true, sympy.false)):
        return None
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(size)]
    number: int | float | bool = kind(expression)
    return number


def write_expression(graph: fx.Graph, expression: sympy.Expr, nodes: dict[sympy.Symbol, fx.Node]) -> fx.Node:
    """Write the expression into the graph and return its node; `nodes` holds one for each of its symbols."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    values = {symbol: fx.Proxy(node, tracer) for symbol, node in nodes.items()}
    result = sympy_interp(_Written, values, expression)
    return result.node if isinstance(result, fx.Proxy) else result


def _call(function: Callable[..., Any], *values: Any) -> Any:
    """Return a proxy for the call, or its result where all values are known."""
    proxies = [value for value in values if isinstance(value, fx.Proxy)]
    return proxies[0].tracer.create_proxy("call_function", function, values, {}) if proxies else function(*values)


class _Written(PythonReferenceAnalysis):
    """As torch's, where that would ask a proxy for its value."""

    maximum = staticmethod(functools.partial(_call, torch.sym_max))
    minimum = staticmethod(functools.partial(_call, torch.sym_min))
    int_truediv = staticmethod(functools.partial(_call, operator.truediv))
    not_ = staticmethod(functools.partial(_call, operator.not_))

    @staticmethod
    def to_dtype(x: Any, dtype: torch.dtype) -> Any:
        return _call({torch.float64: float, torch.int64: int}[dtype], x)

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _call(math.ceil, x)


def is_functorch_wrapper(tensor: Tensor) -> bool:
    """Whether a functorch transform (vmap, grad) wraps the tensor."""
    return bool(torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_gradtrackingtensor(tensor))


# -- asked at every call of an adapted layer: torch's own functions, without one of ours around them

any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for some device."""
dispatch_depth: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many dispatch modes are active."""
dispatch_modes: Callable[[], list[Any]] = torch.utils._python_dispatch._get_current_dispatch_mode_stack
"""Those modes, the outermost first."""
tracing_state: Callable[[], Any] = torch._C._get_tracing_state
"""What torch.jit traces into; None if it does not."""
transformation: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
"""The innermost of torch.func's transformations (vmap, grad) around a call; None outside of all."""
any_global_hook: Callable[[], bool] = torch.nn.modules.module._has_any_global_hook
"""Whether a hook fires for every module."""
DisableTorchFunctionSubclass: Any = torch._C.DisableTorchFunctionSubclass
OpOverload = torch._ops.OpOverload
tensor_without_memory: Any = Tensor._make_wrapper_subclass
"""Makes an instance of a subclass of Tensor that has sizes and no memory."""
grouped_mm: Callable[..., Tensor] = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
"""Products of groups of rows with a matrix each; torch 2.9 has it by its private name."""
unsafe_view: Any = torch.ops.aten._unsafe_view.default


def packing() -> Callable[..., Any] | None:
    """Return the innermost hook that is given every tensor that autograd keeps now; None if there is none."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def moves_tensors(pack: Callable[..., Any] | None) -> bool:
    """Whether a hook on what autograd keeps is one of torch's own, which make it again or keep it elsewhere.

    To ask autograd early for what such a hook was given would undo that.
    """
    return pack is not None and pack.__module__.startswith("torch.")


def hook_on_saved(node: Any, name: str) -> Callable[..., Any] | None:
    """Return the hook that gives a node of autograd the tensor of that name back; None if the node has it itself.

    Raises:
        AttributeError: the node keeps nothing of that name, or torch does not tell (before 2.13).
    """
    hook: Callable[..., Any] | None = getattr(node, f"_raw_saved_{name}").unpack_hook
    return hook


def checkpointing() -> Callable[..., Any] | None:
    """Return the hook of the checkpoint that is at work; each has its own.  None outside, and in a reentrant one."""
    pack = packing()
    return pack if pack is not None and pack.__module__ == "torch.utils.checkpoint" else None


def checkpointed_call() -> object | None:
    """Return what stands for the checkpointed call that runs now, the same object when it is made again; else None."""
    pack = checkpointing()
    if pack is not None:
        return next((held for held in _held_by(pack) if type(held).__name__ == "_CheckpointFrame"), None)
    if torch.is_grad_enabled() and not in_backward():
        return None
    here = inspect.currentframe()  # a reentrant one: an autograd function, whose node holds what it needs
    while here is not None:
        if here.f_code in _REENTRANT:
            return here.f_locals["ctx"]  # type: ignore[no-any-return]
        here = here.f_back
    return None


def _held_by(function: Callable[..., Any]) -> Iterator[object]:
    """Yield what the closure of a function holds, and of functions in it theirs: torch wraps some."""
    for cell in function.__closure__ or ():
        held = cell.cell_contents
        yield held() if isinstance(held, weakref.ref) else held
        if inspect.isfunction(held):
            yield from _held_by(held)


_REENTRANT = (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__)


def in_forward_ad() -> bool:
    """Whether a forward-mode derivative is being computed."""
    return forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for many, under vmap of either kind."""
    functions = torch._C._functorch
    return bool(functions.is_legacy_batchedtensor(tensor) or functions.is_batchedtensor(tensor))


def rebuilds_graph(frame: FrameType) -> bool:
    """Whether a frame runs the code of a GraphModule to write its graph anew, as reading a pickled one does."""
    code = frame.f_code
    return code.co_filename.startswith("<eval_with_key>") and isinstance(frame.f_locals.get("self"), _CodeOnlyModule)


foreach_copy: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_
foreach_norm: Callable[[list[Tensor], float], Sequence[Tensor]] = torch._foreach_norm
foreach_sub: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]] = torch._foreach_sub
"""What is done to many tensors in one call."""


def kinds_checked(tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Return a check, in one call, that as many others surely have the classes, dtypes, sizes, … of these tensors.

    It asks what torch.compile does before it runs what it has made.
    """
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return lambda others: guards.check(*others)
