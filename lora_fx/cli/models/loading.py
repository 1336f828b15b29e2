"""MODEL on the command line, with its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_fx.cli.models.spec import ModelSpecError, called, class_and_config, load_model, model_and_inputs, module_at


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
    found = _from_pretrained(rest) if scheme == "hf" else called(module_at(scheme), scheme, rest)
    model, inputs = model_and_inputs(found, spec)
    return model.eval(), inputs


def _from_pretrained(directory: str) -> Any:
    """Return the model of the class that the configuration names, with the weights of the directory."""
    kind, _ = class_and_config(directory)
    return kind.from_pretrained(directory, local_files_only=True)
