"""transformers notes one dtype for a whole model, that of its first parameter, and reads all weights back in it."""

import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxWarning
from lora_fx.text import listing

_COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights are read and rounded in; 8 bits and less are kept as they are, beside scales."""


def warn_of_narrowed(model: nn.Module) -> None:
    """Name the parameters of a transformers model that `save_pretrained` and `from_pretrained` would round."""
    kind: Any = type(model)
    if not callable(getattr(kind, "save_pretrained", None)) or not callable(
        getattr(kind, "get_input_embeddings", None)
    ):
        return
    floating = [(name, p.dtype) for name, p in model.named_parameters() if p.dtype in _COMPARED]
    if floating:
        _warn_of_rounding(floating[0][1], floating, model, 5)


def warn_of_narrowed_file(config: Mapping[str, Any], tensors: Iterable[tuple[str, torch.dtype]], level: int) -> None:
    """Name the tensors of a checkpoint that `from_pretrained` would round to the dtype that config.json names.

    Nothing is said where it cannot be known what the class keeps apart: without transformers, or of a model of models.

    Args:
        config: what config.json holds.
        tensors: (name, dtype) each.
        level: as `stacklevel` of `warnings.warn`, from here.
    """
    noted = str(config.get("dtype") or config.get("torch_dtype"))
    read = next((dtype for dtype in _COMPARED if name_of_dtype(dtype) == noted), None)
    wide = [] if read is None else [(name, dtype) for name, dtype in tensors if _is_wider(dtype, read)]
    composed = any(isinstance(value, Mapping) and "model_type" in value for value in config.values())
    if read is None or not wide or composed or importlib.util.find_spec("transformers") is None:
        return
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    kind = getattr(importlib.import_module("transformers"), name, None)
    if isinstance(kind, type):
        _warn_of_rounding(read, wide, kind, level + 1)


def _is_wider(dtype: torch.dtype, read: torch.dtype) -> bool:
    return dtype in _COMPARED and torch.promote_types(read, dtype) != read


def _warn_of_rounding(read: torch.dtype, tensors: Iterable[tuple[str, torch.dtype]], model: Any, level: int) -> None:
    """Warn of tensors whose dtype holds more than the one that a model is read in, but for what it keeps apart."""
    names = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if read == torch.float16 else [])]
    kept = [part for name in names for part in getattr(model, name, None) or ()]  # of an object: also its parts' own
    wide = [(name, dtype) for name, dtype in tensors if _is_wider(dtype, read) and not any(p in name for p in kept)]
    if wide:
        rounded = listing([f"{name} ({name_of_dtype(dtype)})" for name, dtype in wide])
        warnings.warn(
            f"config.json says one dtype for all, {name_of_dtype(read)}, and from_pretrained rounds to it what the "
            f"class does not keep apart: {rounded}; from_pretrained(dtype=torch.float32) keeps all values",
            LoraFxWarning,
            stacklevel=level,
        )


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return a dtype's name as torch has it, without the module: `float32`."""
    return str(dtype).removeprefix("torch.")
