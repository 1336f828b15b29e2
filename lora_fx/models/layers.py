"""The layers whose weight is a site, by class: what each does with it, and what keeps some from being adapted."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.models.compressed import coded_embedding, runs_as_its_class
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.overrides import accelerate_hooks, parallel_style, replaced_forward
from lora_fx.models.packed import is_packed, is_packed_class, problem_of
from lora_fx.models.swap import original_class, unswapped
from lora_fx.models.walking import all_names_of
from lora_fx.planning.sites import Layout

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_TORCH: dict[type, tuple[Any, ...]] = {
    **{kind: (kind.forward, kind._conv_forward) for kind in _CONVOLUTIONS},
    nn.Linear: (nn.Linear.forward,),
    nn.Embedding: (nn.Embedding.forward,),
}
"""What torch's own layers compute by; somebody may give such a class another forward later."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What a class of layers does with its `weight`."""

    op: str
    layout: Layout
    shape: tuple[int, ...]
    """As in `Site.shape`."""
    called: bool
    """Whether its forward is the one that is known; else what it does with the weight is seen as it does it."""
    refusal: str | None = None
    aliases: tuple[str, ...] = ()
    """Other names of a raw parameter, below its owner's."""
    packed: bool = False
    """Whether it holds codes, and is run as it is: no F.linear on its weight does the same."""


@dataclass(frozen=True, slots=True)
class KnownModule:
    """A module of a model, with what its class does with its weights."""

    names: tuple[str, ...]
    """Its paths, the first of which is the one that it goes by."""
    module: nn.Module
    kind: LayerKind | None
    """Of its `weight`; None where its class is not known."""
    raw: dict[str, LayerKind]
    """Of its raw parameters, by name."""


def known_modules(model: nn.Module) -> list[KnownModule]:
    """Return every module of a model, in model order; one with several names stands once."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in all_names_of(model):
        names.setdefault(module, []).append(path)
    return [KnownModule(tuple(paths), module, kind_of(module), raw_kinds(module)) for module, paths in names.items()]


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return what a module does with its weight; None for modules that are not known by class."""
    kind: LayerKind | None = _kind_of_class(module)
    if kind is None or not kind.called or kind.packed or replaced_forward(module) is None or runs_as_its_class(module):
        return kind
    return replace(kind, called=False, refusal=_refusal(module, False))


@functools.singledispatch
def _kind_of_class(module: nn.Module) -> LayerKind | None:
    if is_packed(module):
        return _packed_linear(module)
    if not _is_conv1d_of_transformers(original_class(module)):
        return None
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape[::-1]) if weight is not None else (0, 0)
    return LayerKind("linear", "in_out", shape, True, _refusal(module, True))


_kind_of_others = _kind_of_class.dispatch(object)


def has_own_forward(kind: type) -> bool:
    """Whether a class of layers computes something else than the class of torch that it extends."""
    original: Any = unswapped(kind)
    of_torch = next((functions for base, functions in _OF_TORCH.items() if issubclass(original, base)), ())
    return any(getattr(original, function.__name__) is not function for function in of_torch)


def linear_layout(kind: type) -> Layout | None:
    """Return how a class of layers that computes x Wᵀ + b and nothing else stores W; None for any other class."""
    original = unswapped(kind)
    if issubclass(original, nn.Linear):
        return None if has_own_forward(original) else "out_in"
    return "in_out" if _is_conv1d_of_transformers(original) else None


def base_output(layer: nn.Module, input: Tensor) -> Tensor:
    """Return what a layer that is called computes with the weight that it stores, whatever its `weight` shows.

    The same kernels as in the forward of its class: the result is bit-equal to it.
    """
    weight, bias = layer._parameters["weight"], bias_of(layer)
    assert weight is not None
    if isinstance(layer, nn.Linear):
        return F.linear(input, weight, bias)
    if isinstance(layer, nn.Embedding):
        kept = (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq, layer.sparse)
        return F.embedding(input, weight, *kept)
    if isinstance(layer, _CONVOLUTIONS):
        convolved: Tensor = layer._conv_forward(input, weight, bias)
        return convolved
    assert bias is not None  # transformers' Conv1D
    rows = torch.addmm(bias, input.view(-1, input.size(-1)), weight)
    return rows.view(*input.size()[:-1], weight.shape[1])


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias with which a layer computes now; in a replica of nn.DataParallel it is no parameter."""
    bias: Tensor | None = getattr(layer, "bias", None)
    return bias


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    own = module.__dict__
    return bool(
        ("_hf_hook" in own and accelerate_hooks(module))
        or ("forward" in own and parallel_style(module))
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_layer(module: nn.Module) -> bool:
    """Whether `kind_of` knows the module, without reading anything from it but its class."""
    kind = original_class(module)
    known = _kind_of_class.dispatch(kind) is not _kind_of_others
    return known or _is_conv1d_of_transformers(kind) or is_packed_class(kind)


def _is_conv1d_of_transformers(kind: type) -> bool:
    """Whether it is GPT-2's linear, known by name: transformers need not be installed."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


@_kind_of_class.register
def _linear(module: nn.Linear) -> LayerKind:
    if is_packed(module):
        return _packed_linear(module)
    called = not has_own_forward(type(module))
    shape = (module.out_features, module.in_features)
    return LayerKind("linear", "out_in", shape, called, _refusal(module, called))


def _packed_linear(module: Any) -> LayerKind:
    shape = (module.out_features, module.in_features)
    problem = problem_of(module)
    if problem is None and accelerate_hooks(module):
        problem = "accelerate moves its weight, and does not know what it holds beside its codes"
    if problem is not None:
        problem = f"a {original_class(module).__name__} of {original_class(module).__module__.split('.')[0]}: {problem}"
    return LayerKind("linear", "out_in", shape, True, problem, packed=True)


@_kind_of_class.register
def _convolution(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
) -> LayerKind:
    op = f"conv{len(module.kernel_size)}d"
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    if module.transposed:
        reason = "transposed convolutions cannot be adapted; train it whole (`train:`)"
        return LayerKind(op, "out_in", shape, False, reason)
    called = not has_own_forward(type(module))
    return LayerKind(op, "out_in", shape, called, _refusal(module, called))


@_kind_of_class.register
def _embedding(module: nn.Embedding) -> LayerKind:
    called = not has_own_forward(type(module))
    refusal = coded_embedding(module) or _refusal(module, called)
    if module.max_norm is not None:
        refusal = (
            "max_norm rescales the rows that are looked up, base and delta together: no merged weight does the same; "
            "train it whole (`train:`), or set its max_norm to None"
        )
    return LayerKind("embedding", "in_out", (module.embedding_dim, module.num_embeddings), called, refusal)


@_kind_of_class.register
def _embedding_bag(module: nn.EmbeddingBag) -> LayerKind:
    reason = "nn.EmbeddingBag looks up and sums inside of one kernel; use nn.Embedding and a sum"
    return LayerKind("embedding", "in_out", (module.embedding_dim, module.num_embeddings), False, reason)


@_kind_of_class.register
def _bilinear(module: nn.Bilinear) -> LayerKind:
    reason = "nn.Bilinear multiplies by two inputs at once; train it whole (`train:`)"
    return LayerKind("linear", "out_in", tuple(module.weight.shape), False, reason)


def _refusal(module: nn.Module, called: bool) -> str | None:
    """Return why a layer cannot be adapted as it is, or None."""
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization; remove it (torch.nn.utils.parametrize) before"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed at each call (weight_norm, spectral_norm); remove that before"
    if not called and not (type(weight) is nn.Parameter and weight.is_floating_point()):
        name, dtype = type(module).__name__, name_of_dtype(weight.dtype)
        weight_words = f"type {type(weight).__name__} and dtype {dtype}"
        return f"class {name} has a forward of its own; what it does with a weight of {weight_words} is not known"
    return in_eight_bits(weight) or None


def in_eight_bits(weight: Tensor) -> str:
    """Return why a weight of bare 8-bit floating point numbers cannot be adapted; empty for any other."""
    if not weight.is_floating_point() or weight.dtype.itemsize > 1:
        return ""
    return (
        f"its weight is bare {name_of_dtype(weight.dtype)}: torch's layers do not multiply by it, and a change would "
        "be rounded away; convert it, or quantise with torchao"
    )


def raw_kinds(module: nn.Module) -> dict[str, LayerKind]:
    """Return what a module's class does with its own raw parameters, by name: attention, recurrent layers, experts."""
    if isinstance(module, nn.MultiheadAttention):
        joint = module._parameters.get("in_proj_weight") is not None
        names = {"in_proj_weight": ("in_proj", "")} if joint else {f"{p}_proj_weight": (f"{p}_proj",) for p in "qkv"}
        return {name: _raw(module, name, "attention", aliases=others) for name, others in names.items()}
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        reason = "torch runs recurrent layers as one kernel; train it whole (`train:`)"
        return {name: _raw(module, name, "linear", refusal=reason) for name in _of_rank(module, 2)}
    if not type(module).__name__.endswith("Experts"):  # of transformers
        return {}
    layout: Layout = "in_out" if getattr(module, "is_transposed", False) else "out_in"
    return {name: _raw(module, name, "experts", layout) for name in _of_rank(module, 3)}


def _of_rank(module: nn.Module, rank: int) -> Iterator[str]:
    """Yield the names of the module's own parameters with so many dimensions."""
    return (name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() == rank)


def _raw(
    module: nn.Module,
    name: str,
    op: str,
    layout: Layout = "out_in",
    aliases: tuple[str, ...] = (),
    refusal: str | None = None,
) -> LayerKind:
    weight = module._parameters[name]
    assert weight is not None
    return LayerKind(op, layout, site_shape(tuple(weight.shape), op, layout), False, refusal, aliases)


def site_shape(stored: tuple[int, ...], op: str, layout: Layout) -> tuple[int, ...]:
    """Return the shape [.., out, in] of a site whose weight is stored so."""
    if layout == "out_in" or op.startswith("conv") or len(stored) < 2:
        return stored
    return (*stored[:-2], stored[-1], stored[-2])


def norms_in(model: nn.Module) -> list[str]:
    """Return the paths of normalisations with parameters: modules called so that own vectors and hold nothing else."""
    return [
        path
        for path, module in model.named_modules()
        if "norm" in original_class(module).__name__.lower()
        and not module._modules
        and (own := [parameter for parameter in module._parameters.values() if parameter is not None])
        and all(parameter.dim() <= 1 for parameter in own)
    ]


def has_unknown_weights(module: nn.Module) -> bool:
    """Whether the module itself owns a matrix of which its class does not tell whether it multiplies anything."""
    if is_layer(module) or raw_kinds(module) or isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def model_type(model: nn.Module) -> str:
    """Return the type of a transformers model, such as `llama`, as its config tells it; "None" of others."""
    return str(getattr(getattr(model, "config", None), "model_type", None))
