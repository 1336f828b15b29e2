"""Layers of compressed-tensors, as transformers loads them: codes beside scales, told by a scheme on the layer.

The library computes with plain weights alone: a hook on the model decompresses all of it at its first call.  A twin has
no such hook.  Its layers stay codes, and each reads its numbers for the time of one product, forwards and backwards;
the results are those of the decompressed model, bit by bit.  Where the scheme rounds inputs or outputs too, gradients
pass as if it did not (straight through); in the library none pass.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.codelayout import CodeLayout, bare
from lora_fx.models.grids import Grid, grid_of_groups
from lora_fx.models.quantised import gradients_beside_codes
from lora_fx.models.walking import modules_of, named_modules_of

SCHEME = "quantization_scheme"
"""Attribute of modules that compressed-tensors has taken over."""
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of scales that are those of what the codes stand for."""
_STATUS, _HOOK = "quantization_status", "ct_decompress_hook"


class CompressedLinear(nn.Linear):
    """A linear layer of a twin whose weight is codes of compressed-tensors."""

    quantization_scheme: Any

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _CodedProduct.apply(input, self._parameters["bias"], self)  # type: ignore[no-untyped-call]
        return result


class CompressedEmbedding(nn.Embedding):
    """An embedding of a twin whose weight is codes of compressed-tensors; it has no adapter."""

    def forward(self, input: Tensor) -> Tensor:
        settings = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        return F.embedding(input, numbers_of(self), *settings)


class _CodedProduct(torch.autograd.Function):
    """x Wᵀ + b with the numbers that codes stand for now; nothing of their size is kept for the backward pass."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, layer: Any) -> Tensor:
        scheme = layer.quantization_scheme
        x = _rounded(layer, x, "input", scheme.input_activations)
        return _rounded(layer, F.linear(x, numbers_of(layer), bias), "output", scheme.output_activations)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.layer = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return gradients_beside_codes(grad, ctx.needs_input_grad, lambda: numbers_of(ctx.layer))


def _rounded(layer: Any, values: Tensor, which: str, settings: Any) -> Tensor:
    if not settings or not getattr(layer, "quantization_enabled", True):
        return values
    rounded: Tensor = _of_library("quantization.lifecycle.forward").forward_quantize(layer, values, which, settings)
    return rounded


def numbers_of(layer: Any) -> Tensor:
    """Return the weight that the codes of a layer stand for, in the dtype that the library gives it."""
    if not _holds_codes(layer):
        weight: Tensor = layer._parameters["weight"].detach()
        return weight
    with torch.no_grad():
        numbers: Tensor = _compressor(layer).decompress(_state(layer), layer.quantization_scheme)["weight"]
    return numbers


def is_compressed(module: nn.Module) -> bool:
    """Whether compressed-tensors has given the linear layer a forward that does more than that of its class."""
    return SCHEME in vars(module) and isinstance(module, nn.Linear) and not runs_as_its_class(module)


def runs_as_its_class(module: nn.Module) -> bool:
    """Whether the library has a forward on the layer that does what its class's does: plain weights, no rounding."""
    own = vars(module)
    scheme, forward = own.get(SCHEME), own.get("forward")
    if scheme is None or own.get(_STATUS) != "decompressed" or scheme.input_activations or scheme.output_activations:
        return False
    return forward is None or _is_of_library(forward)


def coded_embedding(module: nn.Module) -> str | None:
    """Return why an embedding of the library's cannot be adapted; None for others."""
    if SCHEME not in vars(module) or runs_as_its_class(module):
        return None
    return "compressed-tensors holds its rows as codes; adapt other layers"


def settle_compressed_(twin: nn.Module) -> None:
    """Let the layers of a copy compute with the codes that they hold, in place, and take the library's hook off it.

    Raises:
        RefusedError: naming modules whose keys and values the library rounds, and classes that are not known.
    """
    found = [(path, module) for path, module in named_modules_of(twin) if SCHEME in vars(module)]
    refused = [(path, reason) for path, module in found if (reason := _obstacle(module))]
    if refused:
        raise RefusedError("compressed-tensors computes here in a way that cannot be kept", refused)
    for _, module in found:
        if vars(module).get("forward") is None:
            continue
        if runs_as_its_class(module):
            del vars(module)["forward"]
        elif vars(module).get(_STATUS) in ("compressed", "decompressed"):
            del vars(module)["forward"]
            module.__class__ = CompressedLinear if type(module) is nn.Linear else CompressedEmbedding
    for module in modules_of(twin):
        if vars(module).pop(_HOOK, None) is not None:
            table = module._forward_pre_hooks
            for key in [key for key, hook in table.items() if _HOOK in getattr(hook, "__qualname__", "")]:
                del table[key]


def _obstacle(module: Any) -> str | None:
    """Return why what the library does on a module cannot be done without its forward; None if it can."""
    forward = vars(module).get("forward")
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return f"a {type(module).__name__} whose keys and values are rounded: no gradient passes through them"
    if forward is None or runs_as_its_class(module):
        return None
    if not _is_of_library(forward):
        return "something else than compressed-tensors has replaced its forward (accelerate, to move its weight?)"
    if type(module) not in (nn.Linear, nn.Embedding):
        return f"class {type(module).__name__}: only nn.Linear and nn.Embedding are known"
    scheme = vars(module)[SCHEME]
    if isinstance(module, nn.Embedding) and (scheme.input_activations or scheme.output_activations):
        return "an embedding whose results are rounded: no gradient passes through them"
    return None


def _is_of_library(forward: Any) -> bool:
    function = getattr(forward, "__func__", None)
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("compressed_tensors.")


def _of_library(name: str) -> Any:
    return importlib.import_module(f"compressed_tensors.{name}")


def _holds_codes(layer: Any) -> bool:
    return vars(layer).get(_STATUS) == "compressed" and layer.quantization_scheme.weights is not None


def _compressor(layer: Any) -> Any:
    return _of_library("compressors").BaseCompressor.get_value_from_registry(layer.quantization_scheme.format)


def _state(layer: Any) -> dict[str, Tensor]:
    tensors = {**layer._parameters, **layer._buffers}
    return {name: tensor.data for name, tensor in tensors.items() if tensor is not None and name != "bias"}


def _codes(layer: Any) -> Tensor | None:
    packed: Tensor | None = layer._parameters.get("weight_packed")
    return layer._parameters.get("weight") if packed is None else packed


def _problem(layer: Any) -> str:
    status, forward = vars(layer).get(_STATUS), vars(layer).get("forward")
    table = layer._parameters  # the library's own once it has decompressed a model
    if str(getattr(table, "onload_device", None)) != str(getattr(table, "offload_device", None)):
        return "compressed-tensors offloads it; load the model onto one device"
    if status not in ("compressed", "decompressed"):
        return f"its weight is rounded at each call ({getattr(status, 'value', status)}); compress the model before"
    codes = _codes(layer)
    if codes is not None and codes.is_meta:
        return "its codes are on the meta device: load the model onto the device on which it trains"
    if forward is not None and not _is_of_library(forward):
        return "something else than compressed-tensors has replaced its forward"
    if _holds_codes(layer) and layer.quantization_scheme.format is None:
        return "its scheme does not tell the format of its codes"
    if _holds_codes(layer) and _has_unread_zeros(layer):
        return "its zeros are not packed as its codes are: from_pretrained made them up, and no call can read them"
    return ""


def _has_unread_zeros(layer: Any) -> bool:
    """Whether packed codes stand beside zeros that are not, as where transformers left out those of another size."""
    settings, zero = layer.quantization_scheme.weights, _state(layer).get("weight_zero_point")
    is_packed = layer.quantization_scheme.format == "pack-quantized" and settings.strategy in ("group", "channel")
    return is_packed and not settings.symmetric and zero is not None and zero.dtype != torch.int32


def _dtype(layer: Any) -> torch.dtype | None:
    held = layer._parameters["weight_scale" if _holds_codes(layer) else "weight"]
    dtype: torch.dtype = held.dtype
    return dtype if dtype in _NUMBERS else torch.bfloat16  # into which the library reads codes of 4 and 8 bit floats


def _again(layer: Any, weight: Tensor) -> nn.Module:
    """Quantise on the scales of the layer, or on new ones by the largest values where that comes nearer."""
    made, scheme = bare(layer), layer.quantization_scheme
    weight, state = weight.detach().to(_dtype(layer)), _state(layer)
    if scheme.weights is None:
        state["weight"] = weight
    else:
        compressor = _compressor(layer)
        known = compressor.decompress(state, scheme) if _holds_codes(layer) else state
        tried = [
            compressor.compress(one | {"weight": weight}, scheme)
            for one in (known, _with_scales(known, weight, scheme))
        ]
        plain = [compressor.decompress(one, scheme) for one in tried]
        misses = [float((one["weight"].float() - weight.float()).norm()) for one in plain]
        state = (tried if _holds_codes(layer) else plain)[misses.index(min(misses))]
    for name in [name for name in made._parameters if name != "bias"]:
        del made._parameters[name]
    for name, value in state.items():
        if name not in made._buffers:
            made._parameters[name] = nn.Parameter(value, requires_grad=False)
    result: nn.Module = made
    return result


def _with_scales(state: dict[str, Tensor], weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    """Return a layer's tensors with scales and zeros that reach its largest values; blocks keep theirs."""
    settings, names = scheme.weights, ("weight_scale", "weight_zero_point")
    if str(settings.strategy) not in ("group", "channel", "tensor"):
        return state
    parts = {"group": (len(weight), -1, settings.group_size), "channel": (len(weight), -1), "tensor": (1, -1)}
    values = weight.reshape(parts[str(settings.strategy)])
    found = _of_library("quantization.utils").calculate_qparams(values.amin(-1), values.amax(-1), settings)
    made = zip(names, found, strict=True)
    return state | {name: new.view_as(state[name]).to(state[name].dtype) for name, new in made if name in state}


def _read(layer: Any) -> Tensor:
    return numbers_of(layer) if _holds_codes(layer) else numbers_of(layer).clone()


def _grid(layer: Any) -> Grid | None:
    settings = layer.quantization_scheme.weights
    known = _holds_codes(layer) and settings.type == "int" and str(settings.strategy) in ("group", "channel", "tensor")
    if not known or settings.actorder:
        return None
    state = _compressor(layer).decompress(_state(layer), layer.quantization_scheme)
    zero = state.get("weight_zero_point")
    return grid_of_groups(state["weight"], state["weight_scale"], zero, settings.num_bits)


COMPRESSED = CodeLayout(_codes, _problem, _dtype, _read, _again, grid=_grid)
