"""The tensors of an adapter's file, of numbers that torch computes with, and by names as the model has them."""

import os
from pathlib import Path

from torch import Tensor

from lora_fx.errors import AdapterFileError, MergeError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.names import is_copied_bias, is_of_training
from lora_fx.files.adapter.variants import as_plain_lora
from lora_fx.files.safetensors import read_raw
from lora_fx.files.values import READ, read_tensors
from lora_fx.models.wrappers import without_wrappers
from lora_fx.sources.regular import UnreadableError


def as_here(path: Path, config: Configuration, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what counts of PEFT's tensors, as plain LoRA, without the names of wrappers inside of the model.

    Raises:
        AdapterFileError: a tensor is there twice, or is none of its method's.
    """
    left_out = [key for key in tensors if is_of_training(key) or (config.bias == "all" and is_copied_bias(key))]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    names = {key: without_wrappers(key) for key in tensors}
    if len(set(names.values())) < len(names):
        twice = [(key, name) for key, name in names.items() if key != name and name in tensors]
        raise AdapterFileError(str(path), "has a tensor twice, inside of a wrapper and outside", twice)
    return as_plain_lora({names[key]: tensor for key, tensor in tensors.items()}, config, str(path))


def tensors_in(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, views of a map of it, and its metadata.

    Raises:
        AdapterFileError: it is missing, cut off or damaged, or has values that no adapter has.
    """
    if not os.path.lexists(path):
        old = path.with_name("adapter_model.bin")
        advice = (
            "it has only adapter_model.bin, a pickle, which is not read: convert it with PEFT" if old.is_file() else ""
        )
        raise AdapterFileError(str(path), "does not exist", advice=advice)
    try:
        raw = read_raw(path)
    except MergeError as error:
        raise AdapterFileError(str(path), f"cannot be read: {_after(path, error)}") from error
    other = [(name, f"is of {entry.dtype}") for name, entry in raw.tensors.items() if entry.dtype not in READ]
    if other:
        raise AdapterFileError(str(path), "has values that lora_fx does not read", other)
    try:
        return {name: _wide(tensor) for name, tensor in read_tensors(raw).items()}, raw.metadata
    except (OSError, ValueError, MergeError, UnreadableError) as error:  # it has changed since
        raise AdapterFileError(
            str(path), f"cannot be read: {error}", advice="the file is cut off or damaged; copy it again"
        ) from error


def _after(path: Path, error: MergeError) -> str:
    """Return what an error says behind the path."""
    return str(error).removeprefix(f"{path}: ")


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor of 8-bit floats in float32, which holds each of their values; any other as it is."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor
