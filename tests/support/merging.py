"""Small checkpoints and adapters on disk, written with the safetensors library alone, and the merge in one piece."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_fx.adapters.factors.lora import folded_weight, low_rank_weight

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."
Q, UP, NORM = "model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.0.norm"


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
        size = sum(tensor.nbytes for tensors in shards for tensor in tensors.values())
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
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def base_tensors(dtype=torch.bfloat16):
    return {
        f"{Q}.weight": weight(48, 48, dtype=dtype),
        f"{UP}.weight": weight(96, 48, dtype=dtype),
        f"{NORM}.weight": weight(48, dtype=dtype),
        "model.embed_tokens.weight": weight(50, 48, dtype=dtype),
        "steps": torch.arange(7),
    }


def in_memory(tensors, adapter, *paths, scaling=1.5):
    """Return the tensors with those sites merged by the functions that `merge` uses."""
    merged = dict(tensors)
    for path in paths:
        factor = [adapter[f"{PREFIX}{path}.lora_{name}.weight"] for name in "AB"]
        merged[f"{path}.weight"] = folded_weight(tensors[f"{path}.weight"], low_rank_weight(*factor, scaling))
    return merged


def assert_same(result, expected):
    assert sorted(result) == sorted(expected)
    for name, tensor in expected.items():
        assert result[name].dtype == tensor.dtype, name
        assert torch.equal(result[name], tensor), name


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def looks_complete(folder: Path) -> bool:
    return (folder / "config.json").exists()
