"""Which layers of quantisation libraries hold codes, by class: what each of them holds, and which cannot be run."""

from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.models.codelayout import CodeLayout
from lora_fx.models.codes_bitsandbytes import EIGHT_BITS, FOUR_BITS
from lora_fx.models.codes_hqq import HQQ
from lora_fx.models.codes_quanto import QUANTO
from lora_fx.models.compressed import COMPRESSED, is_compressed
from lora_fx.models.swap import original_class

KNOWN: dict[str, CodeLayout] = {
    "bitsandbytes.nn.modules.Linear4bit": FOUR_BITS,
    "bitsandbytes.nn.modules.Linear8bitLt": EIGHT_BITS,
    "hqq.core.quantize.HQQLinear": HQQ,
    "optimum.quanto.nn.qlinear.QLinear": QUANTO,
    "lora_fx.models.compressed.CompressedLinear": COMPRESSED,
}

NOT_RUN = ("gptqmodel.", "auto_gptq.", "awq.", "hqq.", "transformers.integrations.")
"""What the modules of classes begin with whose kernels are not known to pass gradients."""


def found_on(module: nn.Module) -> CodeLayout | None:
    """Return how a layer holds its weight where that does not show in its class."""
    if is_compressed(module):
        return COMPRESSED
    return _UNKNOWN if _is_of_others(module) else None


def _is_of_others(module: nn.Module) -> bool:
    kind = original_class(module)
    if not kind.__module__.startswith(NOT_RUN):
        return False
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and _codes_of_others(module) is not None


def _codes_of_others(layer: Any) -> Tensor | None:
    """Return what a layer holds beside its bias, if that are codes."""
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    codes = (t for name, t in tensors if t is not None and name != "bias" and t.dtype not in _PLAIN)
    return next(codes, None)


_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _refused(layer: Any, *_: Any) -> Any:
    raise RefusedError(
        "what the codes of these layers stand for is not known",
        [(original_class(layer).__name__, f"of {original_class(layer).__module__}")],
        "dequantise the model with the library that has quantised it",
    )


_UNKNOWN = CodeLayout(
    _codes_of_others,
    lambda _: (
        "what its kernels do with the codes, and whether gradients pass, has not been run; dequantise the model with "
        "the library that has quantised it, or adapt the one it was made from"
    ),
    lambda _: None,
    _refused,
    _refused,
)
