"""Small checkpoints and adapters on disk, written with the safetensors library alone, and the merge in one piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape) * 0.05).to(dtype)


def write_base(folder: Path, *shards: Tensors, config: Mapping[str, object] | None = None) -> Path:
    """Write a checkpoint: one file, or several with an index; with a config.json and a tokenizer."""
    folder.mkdir(parents=True)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards):
        save_file(tensors, folder / name, {"format": "pt"})
    if len(shards) > 1:
        placed = {key: name for name, tensors in zip(names, shards) for key in tensors}
        size = sum(each.nbytes for tensors in shards for each in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": False, **(config or {})})
    )
    (folder / "tokenizer.json").write_text('{"a": 1}')
    return folder


def factors(path: str, out: int, inputs: int, r: int = 4) -> Tensors:
    A, B = torch.randn(r, inputs) * 0.1, torch.randn(out, r) * 0.1
    return {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}


def write_adapter(folder: Path, tensors: Tensors, **config: object) -> Path:
    """Write an adapter as PEFT does."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def delta(adapter: Tensors, path: str, scaling: float = 1.5) -> Tensor:
    return (adapter[f"{PREFIX}{path}.lora_B.weight"] @ adapter[f"{PREFIX}{path}.lora_A.weight"]) * scaling


def loaded(folder: Path) -> Tensors:
    """Return all tensors of a directory, read by the library."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
