"""The layers whose weight is a site, by class: what each does with it, and what keeps some from being adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_fx.models.swap import original_class, unswapped
from lora_fx.planning.sites import Layout

_CONVOLUTIONS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
_TRANSPOSED = {nn.ConvTranspose1d: "conv1d", nn.ConvTranspose2d: "conv2d", nn.ConvTranspose3d: "conv3d"}
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


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


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return what a module does with its weight; None for modules that are not known by class."""
    for kinds, describe in _DESCRIBE:
        if isinstance(module, kinds):
            return describe(module)
    return _transposed_linear(module) if _is_conv1d_of_transformers(module) else None


def linear_layout(kind: type) -> Layout | None:
    """Return how a class of layers that computes x Wᵀ + b and nothing else stores W; None for any other class."""
    original = unswapped(kind)
    if issubclass(original, nn.Linear):
        return "out_in" if original.forward is nn.Linear.forward else None
    return "in_out" if _is_named_conv1d(original) else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_layer(module: nn.Module) -> bool:
    """Whether `kind_of` knows the module, without reading anything from it but its class."""
    return isinstance(module, _LAYERS) or _is_conv1d_of_transformers(module)


def _linear(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.Linear)
    called = linear_layout(type(module)) is not None
    shape = (module.out_features, module.in_features)
    return LayerKind("linear", "out_in", shape, called, _refusal(module, called))


def _convolution(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    op, base = next((op, base) for base, op in _CONVOLUTIONS.items() if isinstance(module, base))
    kind: Any = original_class(module)
    called = kind.forward is base.forward and kind._conv_forward is base._conv_forward
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return LayerKind(op, "out_in", shape, called, _refusal(module, called))


def _transposed_convolution(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    op = next(op for base, op in _TRANSPOSED.items() if isinstance(module, base))
    shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    reason = "transposed convolutions cannot be adapted; train it whole (`train:`)"
    return LayerKind(op, "out_in", shape, False, reason)


def _embedding(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.Embedding)
    called = original_class(module).forward is nn.Embedding.forward
    shape = (module.embedding_dim, module.num_embeddings)
    refusal = _refusal(module, called)
    if module.max_norm is not None:
        refusal = (
            "max_norm rescales the rows that are looked up, base and delta together: no merged weight does the same; "
            "train it whole (`train:`), or set its max_norm to None"
        )
    return LayerKind("embedding", "in_out", shape, called, refusal)


def _bag(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.EmbeddingBag)
    reason = "nn.EmbeddingBag looks up and sums inside of one kernel; use nn.Embedding and a sum"
    return LayerKind("embedding", "in_out", (module.embedding_dim, module.num_embeddings), False, reason)


def _bilinear(module: nn.Module) -> LayerKind:
    assert isinstance(module, nn.Bilinear)
    reason = "nn.Bilinear multiplies by two inputs at once; train it whole (`train:`)"
    return LayerKind("linear", "out_in", tuple(module.weight.shape), False, reason)


def _transposed_linear(module: nn.Module) -> LayerKind:
    weight = module._parameters.get("weight")
    shape = tuple(weight.shape[::-1]) if weight is not None else (0, 0)
    return LayerKind("linear", "in_out", shape, True, _refusal(module, True))


_DESCRIBE: tuple[tuple[type | tuple[type, ...], Callable[[nn.Module], LayerKind]], ...] = (
    (nn.Linear, _linear),
    (tuple(_CONVOLUTIONS), _convolution),
    (tuple(_TRANSPOSED), _transposed_convolution),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _bag),
    (nn.Bilinear, _bilinear),
)


_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, nn.Embedding, nn.EmbeddingBag, nn.Bilinear)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, known by name: transformers need not be installed."""
    return _is_named_conv1d(original_class(module))


def _is_named_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _refusal(module: nn.Module, called: bool) -> str | None:
    """Return why a layer cannot be adapted as it is, or None."""
    if nn.utils.parametrize.is_parametrized(module):
        return "its weight is computed by a parametrization; remove it (torch.nn.utils.parametrize) before"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed at each call (weight_norm, spectral_norm); remove that before"
    if not called and not (type(weight) is nn.Parameter and weight.is_floating_point()):
        name = type(module).__name__
        return f"class {name} has a forward of its own; what it does with a weight of {_words(weight)} is not known"
    return None


def _words(weight: Tensor) -> str:
    return f"type {type(weight).__name__} and dtype {str(weight.dtype).removeprefix('torch.')}"


def attention_weights(module: nn.MultiheadAttention) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (parameter, other names for it) for every projection that the module itself owns."""
    if module._parameters.get("in_proj_weight") is not None:
        yield "in_proj_weight", ("in_proj", "")
    else:
        for part in "qkv":
            yield f"{part}_proj_weight", (f"{part}_proj",)


def recurrent_weights(module: nn.Module) -> Iterator[str]:
    """Yield the names of the matrices of an LSTM, GRU or RNN, or of a cell."""
    if isinstance(module, _RECURRENT):
        yield from (name for name, parameter in module._parameters.items() if parameter is not None and
                    parameter.dim() == 2)  # fmt: skip


RECURRENT = "torch runs recurrent layers as one kernel; train it whole (`train:`)"


def expert_banks(module: nn.Module) -> Iterator[tuple[str, Layout]]:
    """Yield the banks of matrices of a class that is known to hold experts (transformers')."""
    if not type(module).__name__.endswith("Experts"):
        return
    layout: Layout = "in_out" if getattr(module, "is_transposed", False) else "out_in"
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3:
            yield name, layout
