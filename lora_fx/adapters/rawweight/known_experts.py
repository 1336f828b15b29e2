"""Which routed experts are computed as one function (`experts`), asked at every call.

Those of transformers whose forward is one that is known here, word by word: half a hundred models share it, Mixtral and
Qwen3-MoE among them.  What it computes is known for each of its implementations (`eager`, `grouped_mm`); and before the
first call the two are compared on a small bank, results and gradients.  All others show their weights to their own
forward, as any code that reads weights does, which is right for all of them.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import STATE, Attached, in_use
from lora_fx.adapters.fused.eligible import are_plain_factors, is_plain, is_watched
from lora_fx.adapters.rawweight.experts import Banks, ExpertFacts, Routing, routed_experts
from lora_fx.models.layers import has_hooks
from lora_fx.models.swap import original_class
from lora_fx.models.torch_internals import any_autocast_enabled

BANKS = ("gate_up_proj", "down_proj")
_FLAGS = {
    "has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False,
    "is_concatenated": True, "_is_expert_parallel": False,
}  # fmt: skip
_ONE_BY_ONE, _AT_ONCE = "7bf2ff653c40f31f", "6e68591c53610323"
"""Hashes of the known forwards: a loop over the experts of transformers 5's models, and its `grouped_mm`."""
_DISPATCH, _GATE = "21e91fa667bcd912", "3fedfe634a06b7ce"
"""Of what chooses between them, and of the gate."""
_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")


def experts_output(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return what a module of routed experts computes with its adapters; None if its own forward must run."""
    state = owner.__dict__.get(STATE)
    if state is None or not torch.is_grad_enabled() or len(args) != 3 or kwargs:
        return None
    if is_watched() or any_autocast_enabled():
        return None
    grouped = _implementation(owner)
    banks = None if grouped is None else _banks(owner)
    if banks is None or not _fit(args, banks[0], bool(grouped)):
        return None
    x, index, weights = args
    if not any(tensor.requires_grad for tensor in (x, weights, *banks[0])):
        return None
    facts = ExpertFacts(owner.act_fn, banks[1], bool(grouped))
    routing = Routing.of(index, banks[0].up.shape[0], facts.grouped)
    if routing is None or not routing.counts or not _is_proven(owner, facts, banks[0]):
        return None
    return routed_experts(facts, routing, x, weights, banks[0])


def _fit(args: tuple[Any, ...], banks: Banks, grouped: bool) -> bool:
    """Whether the arguments are hidden states, the experts of each, and their weights, on one device."""
    x, index, weights = args
    if not (is_plain(x) and is_plain(weights) and type(index) is Tensor and index.dtype == torch.int64):
        return False
    alike = banks.up.dtype == banks.down.dtype == x.dtype and weights.dtype in (x.dtype, torch.float32)
    near = all(tensor.device == x.device for tensor in (index, weights, *banks))
    known = not grouped or x.device.type == "cpu"  # elsewhere groups are not waited for: torch's kernels know them
    return alike and near and known and x.dim() == index.dim() == 2 and index.shape == weights.shape


def _banks(owner: nn.Module) -> tuple[Banks, tuple[float, float]] | None:
    """Return the banks and factors, and the scalings; None where one is trained, or its adapter not a plain one."""
    used = [in_use(owner, name) for name in BANKS]
    weights = [owner._parameters.get(name) for name in BANKS]
    if any(len(ones) != 1 for ones in used) or not all(map(is_plain, weights)):
        return None
    if not all(_is_plain_adapter(ones[0][0]) for ones in used):
        return None
    if any(weight.requires_grad for weight in weights):  # type: ignore[union-attr]
        return None
    (up, up_share), (down, down_share) = used[0][0], used[1][0]
    factors = [factor.weight for one in (up, down) for factor in (one.lora_A, one.lora_B)]
    return Banks(*weights, *factors), (up.spec.scaling * up_share, down.spec.scaling * down_share)  # type: ignore[arg-type]


def _is_plain_adapter(adapter: Attached) -> bool:
    dropout = adapter.dropout
    dropped = dropout is not None and dropout.training and getattr(dropout, "p", 1) > 0
    fitting = adapter.spec.site.layout == "out_in" and adapter.spec.site.is_banked and adapter.call is None
    plain = are_plain_factors(adapter.lora_A, adapter.lora_B)
    return fitting and plain and not dropped and adapter.magnitude is None


# -- which forward it is


def _implementation(owner: nn.Module) -> bool | None:
    """Return whether the known forward would multiply all experts at once; None if it is not a known one."""
    interface = interface_of(original_class(owner))
    values = owner.__dict__
    if interface is None or "_apply_gate" in values:  # of this module alone
        return None
    if any(values.get(name) is not value for name, value in _FLAGS.items()):
        return None
    if values.get("num_experts") != owner._parameters["gate_up_proj"].shape[0]:  # type: ignore[union-attr]
        return None
    activation = owner._modules.get("act_fn")
    if type(activation).__module__ not in _ACTIVATIONS or _is_odd(activation):
        return None
    name = getattr(values.get("config"), "_experts_implementation", None)
    if name == "grouped_mm":
        return True if _text(interface[name]) == _AT_ONCE else None
    return False if name == "eager" else None


def _is_odd(activation: Any) -> bool:
    """Whether an activation has a state or hooks, or draws or writes."""
    state = (*activation.parameters(), *activation.buffers())
    return bool(state) or has_hooks(activation) or getattr(activation, "inplace", False) or type(activation) is nn.RReLU


def interface_of(kind: type[nn.Module]) -> Any:
    """Return the implementations out of which a class of known experts takes its forward; None for another class."""
    return _interface(kind.forward, getattr(kind, "_apply_gate", None))


@functools.cache
def _interface(forward: Callable[..., Any], gate: Callable[..., Any] | None) -> Any:
    known = (getattr(forward, "__wrapped__", None), _ONE_BY_ONE), (forward, _DISPATCH), (gate, _GATE)
    if not all(function is not None and _text(function) == text for function, text in known):
        return None
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    return cells["experts_interface"].cell_contents if cells["original_forward"].cell_contents is known[0][0] else None


@functools.cache
def _text(function: Any) -> str:
    """Return a hash of a function's words; empty where they are not known."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    told = ast.get_docstring(tree) is not None
    words = [argument.arg for argument in tree.args.args] + [ast.unparse(line) for line in tree.body[told:]]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


# -- proof

_proven: dict[tuple[Any, ...], bool] = {}
_NEAR = 1e-3


def _is_proven(owner: Any, facts: ExpertFacts, banks: Banks) -> bool:
    """Whether function and forward agree on a small bank, results and gradients; asked once for each forward."""
    kind = original_class(owner)
    members = tuple(map(len, banks[2:]))
    key = (kind.forward, type(owner.act_fn), facts.grouped, banks.down.device.type, tuple(n > 1 for n in members))
    if key not in _proven:
        # what is kept here is nobody's: a checkpoint counts what it is given
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            _proven[key] = _agree(owner, kind, facts, members)
    return _proven[key]


def _agree(owner: Any, kind: type[nn.Module], facts: ExpertFacts, members: tuple[int, ...]) -> bool:
    number, width, inner, r, tokens = int(owner.num_experts), 8, 4, 2, 12
    device = owner._parameters["down_proj"].device
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    up, down = random(number, 2 * inner, width).detach(), random(number, width, inner).detach()
    sizes = ((r, width), (2 * inner, r), (r, inner), (width, r))
    factors = [random(one, *size) for one, size in zip(members, sizes, strict=True)]
    top = min(2, number)
    index = torch.stack([torch.randperm(number, generator=generator)[:top] for _ in range(tokens)]).to(device)
    x, weights = random(tokens, width), random(tokens, top)
    A1, B1, A2, B2 = factors
    dense = (up + facts.scalings[0] * B1 @ A1, down + facts.scalings[1] * B2 @ A2)
    for size in (1.0, 100.0):  # no value is cut off
        routing = Routing.of(index, number, facts.grouped)
        assert routing is not None
        mine = routed_experts(facts, routing, x * size, weights, Banks(up, down, *factors))
        theirs = kind.forward(_stand_in(owner, kind, dense), x * size, index, weights)
        runs = [
            (run, *torch.autograd.grad(run.square().sum(), (x, weights, *factors), retain_graph=True))
            for run in (mine, theirs)
        ]
        if not all((a - b).abs().max() <= _NEAR * b.abs().max() for a, b in zip(*runs, strict=True)):
            return False
    return True


def _stand_in(owner: Any, kind: type[nn.Module], banks: tuple[Tensor, Tensor]) -> Any:
    """Return a module of that class with other banks, which are no parameters."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    own = {name: value for name, value in owner.__dict__.items() if name not in module.__dict__}
    module.__dict__.update(own, training=owner.training, **dict(zip(BANKS, banks, strict=True)))
    module.add_module("act_fn", owner.act_fn)
    return module
