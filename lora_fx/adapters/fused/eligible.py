"""Which adapted layers compute base and adapter as one operation, asked at every call.

What a plan foresees (`obstacle_to_fusing`) is asked again of the layer as it is now; the rest only a call can tell.
Whatever is not plain (a hook on a factor, a trained base weight, a tensor subclass that is not quantised, a
transformation or a compiler around it) is computed operation by operation instead, which is right for all of them.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_fx.adapters.factors.dora import DoRAMagnitude
from lora_fx.adapters.factors.kinds import SharedFactor, SlicedB
from lora_fx.adapters.factors.lora import LoRAFactor, as_rows
from lora_fx.adapters.factors.moved import MovedA, MovedB
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.adapters.fused.contraction import merges
from lora_fx.adapters.fused.masks import is_possible, new_seed, shared_seed
from lora_fx.adapters.fused.terms import Facts, Term, autocast_dtype, product_dtype
from lora_fx.adapters.selection import Chosen
from lora_fx.adapters.stacked import Plain
from lora_fx.models.layers import bias_of, has_hooks, linear_layout
from lora_fx.models.packed import PackedWeight, is_packed, is_packed_class
from lora_fx.models.quantised import is_quantised
from lora_fx.models.swap import unswapped
from lora_fx.models.torch_internals import (
    any_global_hook,
    dispatch_depth,
    dispatch_modes,
    in_forward_ad,
    tracing_state,
    transformation,
)
from lora_fx.planning.planned import FUSED_DTYPES, obstacle_to_fusing
from lora_fx.planning.sites import Layout


@functools.cache
def _layout_of(kind: type) -> Layout | None:
    return "out_in" if is_packed_class(unswapped(kind)) else linear_layout(kind)


_FLOATS = {getattr(torch, name): name for name in FUSED_DTYPES}
_FACTORS = frozenset(
    (
        (LoRAFactor, LoRAFactor), (LoRAFactor, SlicedB), (MovedA, MovedB),
        (SharedFactor, LoRAFactor), (LoRAFactor, SharedFactor),
    )
)  # fmt: skip
_PLAIN = frozenset((Tensor, nn.Parameter))
_RECORDERS = frozenset(("torch.utils.checkpoint", "torch.fx.experimental.proxy_tensor"))
"""Modes that record operations one by one, to be run again: what they return must not be changed in place.

Of selective checkpointing and of make_fx.
"""


def is_watched() -> bool:
    """Whether something follows the operations that does not see into an autograd function."""
    return (
        torch.compiler.is_compiling()
        or transformation() is not None
        or tracing_state() is not None
        or in_forward_ad()
        or any_global_hook()
        or (dispatch_depth() > 0 and any(type(mode).__module__ in _RECORDERS for mode in dispatch_modes()))
    )


class _Factors(NamedTuple):
    """The factors of one adapter, or of several below each other."""

    A: Tensor
    B: Tensor
    scaling: float
    p: float
    runs: Any
    """Of a factor B in parts; empty for a whole one."""
    spec: AdapterSpec
    magnitude: DoRAMagnitude | None


def term_of(layer: Any, chosen: Chosen, x: Tensor) -> Term | None:
    """Return a layer with adapters as a term of a fused product with x; None if it must go operation by operation.

    With dropout, the seed of its mask is drawn here.

    >>> import lora_fx
    >>> rules = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2, "alpha": 4}}]}
    >>> layer = lora_fx.apply(nn.Sequential(nn.Linear(3, 5)), rules)[0]
    >>> term = term_of(layer, (("default", 1.0),), torch.zeros(1, 3))
    >>> list(term.weight.shape), list(term.A.shape), list(term.B.shape), term.facts.scaling
    ([5, 3], [2, 3], [5, 2], 2.0)
    >>> term_of(layer, (("default", 1.0),), torch.zeros(1, 3, dtype=torch.float64)) is None
    True
    """
    if is_watched():  # first: a compiler follows these lines too
        return None
    kind: Any = type(layer)
    layout = _layout_of(kind)
    if layout is None or not is_plain(x):
        return None
    parameters = layer._parameters
    weight, bias = parameters.get("weight"), _own_bias(layer, kind)
    if is_packed(layer):
        weight = PackedWeight(layer, x.dtype)
    plain = is_plain(weight)
    cast = autocast_dtype(x.device.type)
    if not (plain or (cast is None and is_quantised(weight))) or weight.requires_grad:
        return None
    if product_dtype(x) != (cast or weight.dtype) or not (
        bias is None or (is_plain(bias) and bias.dtype == weight.dtype)
    ):
        return None
    if len(chosen) == 1:
        factors = _factors_of(layer, *chosen[0], weight.dtype)
    else:
        factors = _joined([_factors_of(layer, name, share, weight.dtype) for name, share in chosen])
    if factors is None:
        return None
    first, second, scaling, p, runs, spec, magnitude = factors
    scale = None
    if magnitude is not None:
        whole = layer._modules["lora_B"]._modules[chosen[0][0]].matrix
        scale = magnitude.scale(as_rows(weight, spec.site.layout), first, whole)
    if cast is not None:
        weight, bias = weight.to(cast), None if bias is None else bias.to(cast)
        first, second = first.to(cast), second.to(cast)
    seed = _seed(layer, spec.lora.share_dropout, x, p) if p else None
    merged = plain and not runs and merges(x, weight, first, second, p > 0, scale is not None)
    return Term(Facts(scaling, layout == "in_out", p, seed, merged, runs), weight, bias, first, second, scale)


def row_factors(layer: Any, names: Sequence[str | None], x: Tensor) -> dict[str, Plain] | None:
    """Return the factors of a linear layer's adapters of these names; None if more happens there than two products."""
    kind: Any = type(layer)
    if _layout_of(kind) is None or not x.is_floating_point():
        return None
    dtype = x.dtype if is_packed(layer) else layer._parameters["weight"].dtype
    dtype = dtype if dtype in _FLOATS else x.dtype
    found: dict[str, Plain] = {}
    for name in filter(None, names):
        factors = _factors_of(layer, name, 1.0, dtype) if dtype in _FLOATS else None
        if factors is None or factors.p or factors.runs or factors.magnitude is not None:
            return None
        found[name] = Plain(factors.A, factors.B, factors.scaling)
    return found if len({one.A.dtype for one in found.values()}) == 1 else None


def _factors_of(layer: Any, name: str, share: float, dtype: torch.dtype) -> _Factors | None:
    """Return the factors of one adapter of a layer; None if more happens there than two products."""
    modules = layer._modules
    A, B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    holder = modules.get("lora_dropout")
    p = 0.0 if holder is None else dropout_of(holder, name)
    if p is None or not are_plain_factors(A, B):
        return None
    first, second, spec = A._parameters["weight"], B._parameters["weight"], A.spec
    if type(A) is MovedA:
        first, second = A.matrix, B.matrix
    sliced = type(B) is SlicedB
    are_runs = not sliced or B.runs is not None
    if obstacle_to_fusing(spec.site, are_runs, spec.calls > 0, _FLOATS[dtype]):
        return None
    magnitude = modules["lora_magnitude_vector"]._modules[name] if spec.lora.dora else None
    if spec.lora.dora and (share != 1 or type(magnitude) is not DoRAMagnitude or has_hooks(magnitude)):
        return None
    return _Factors(first, second, spec.lora.scaling * share, p, B.runs if sliced else (), spec, magnitude)


def _joined(found: Sequence[_Factors | None]) -> _Factors | None:
    """Return the factors of several adapters as one: all A below each other; None if they do not join."""
    several = [factors for factors in found if factors is not None]
    if len(several) < len(found) or any(one.p or one.runs or one.magnitude is not None for one in several):
        return None
    if len({one.A.dtype for one in several}) > 1:
        return None
    A, B = torch.cat([one.A for one in several]), torch.cat([one.B * one.scaling for one in several], dim=1)
    return _Factors(A, B, 1.0, 0.0, (), several[0].spec, None)


def is_plain(tensor: Any) -> bool:
    """Whether it is a tensor or parameter of torch's own classes, of a dtype in which products are fused."""
    return type(tensor) in _PLAIN and tensor.dtype in _FLOATS and tensor.layout is torch.strided


def are_plain_factors(A: Any, B: Any) -> bool:
    """Whether two factors of an adapter are multiplied by, and nothing else happens when they are called."""
    if (type(A), type(B)) not in _FACTORS or has_hooks(A) or has_hooks(B):
        return False
    first, second = A._parameters.get("weight"), B._parameters.get("weight")
    return is_plain(first) and is_plain(second) and first.dtype == second.dtype


def dropout_of(holder: Any, adapter: str) -> float | None:
    """Return the probability of an adapter's dropout as it is now; None if it is not a known dropout."""
    if holder is None:
        return 0.0
    dropout = holder._modules.get(adapter)
    if dropout is None:
        return 0.0
    if type(dropout) is not nn.Dropout or has_hooks(dropout):
        return None
    if not dropout.training:
        return 0.0
    return dropout.p if is_possible(dropout.p) else None


def _own_bias(layer: Any, kind: Any) -> Tensor | None:
    """Return the bias with which a layer computes, where no compiler follows."""
    parameters: dict[str, Tensor | None] = layer._parameters
    shown = getattr(kind, "bias", ...)  # a property, where it is trained
    return parameters["bias"] if shown is ... and "bias" in parameters else bias_of(layer)


def _seed(layer: Any, shares: bool, x: Tensor, p: float) -> Tensor:
    return shared_seed(x, p, id(layer)) if shares and not x.is_inference() else new_seed(x)
