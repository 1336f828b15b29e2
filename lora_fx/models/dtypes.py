"""transformers notes one dtype for a whole model, that of its first parameter, and reads all weights back in it."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxWarning
from lora_fx.text import listing


def warn_of_narrowed(model: nn.Module) -> None:
    """Name the parameters of a transformers model that `save_pretrained` and `from_pretrained` would round."""
    kind: Any = type(model)
    if not callable(getattr(kind, "save_pretrained", None)) or not callable(
        getattr(kind, "get_input_embeddings", None)
    ):
        return
    floating = [(name, p.dtype) for name, p in model.named_parameters() if p.is_floating_point()]
    if floating:
        kept = _kept_wide(kind, floating[0][1])
        warn_of_rounding(floating[0][1], ((n, d) for n, d in floating if not any(part in n for part in kept)), 5)


def warn_of_rounding(read: torch.dtype, tensors: Iterable[tuple[str, torch.dtype]], stacklevel: int) -> None:
    """Name the tensors whose dtype holds more than the one that a model is read in.

    Args:
        read: what config.json says, or will say.
        tensors: (name, dtype) each.
        stacklevel: as of `warnings.warn`, from here.
    """
    rounded = [f"{name} ({_text(dtype)})" for name, dtype in tensors if torch.promote_types(read, dtype) != read]
    if rounded:
        warnings.warn(
            f"config.json says one dtype for all, {_text(read)}, and from_pretrained rounds to it what the class does "
            f"not keep apart: {listing(rounded)}; from_pretrained(dtype=torch.float32) keeps all values",
            LoraFxWarning,
            stacklevel=stacklevel,
        )


def _kept_wide(kind: Any, read: torch.dtype) -> list[str]:
    """Return parts of the names of parameters that the class itself reads in float32."""
    names = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if read == torch.float16 else [])]
    return [part for name in names for part in getattr(kind, name, None) or ()]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
