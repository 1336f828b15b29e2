"""MODEL on the command line, with its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lora_fx import modelspec
from lora_fx.modelspec import ModelSpecError, load_model


def load_with_weights(spec: str) -> tuple[nn.Module, object]:
    """Return (model, example inputs or None) as `load_model` does, but with values: `hf:DIRECTORY` needs its weights.

    Raises:
        ModelSpecError: says what is wrong with the text, the file, or what the factory returned.
    """
    scheme, _, rest = spec.partition(":")
    if spec.endswith((".safetensors", ".index.json")):
        raise ModelSpecError(f"'{spec}' has names and weights only, and no model: give hf:DIRECTORY or a factory")
    if not rest or spec.endswith(".pt2"):
        return load_model(spec)
    found = _from_pretrained(rest) if scheme == "hf" else modelspec._call(modelspec._module(scheme), scheme, rest)
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"'{spec}' gives an object of type {type(model).__name__}, not a torch.nn.Module")
    return model.eval(), inputs


def _from_pretrained(directory: str) -> Any:
    """Return the model of the class that the configuration names, with the weights of the directory."""
    if not (Path(directory) / "config.json").is_file():
        raise ModelSpecError(f"{directory}/config.json does not exist; hf: takes a directory, not a name of a hub")
    try:
        import transformers
    except ImportError as error:
        raise ModelSpecError("hf: needs transformers: pip install 'lora-fx[hf]'") from error
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    kinds = (vars(transformers).get(name) or getattr(transformers, name, None) for name in config.architectures or ())
    kind = next((kind for kind in kinds if kind is not None), transformers.AutoModel)
    return kind.from_pretrained(directory, local_files_only=True)
