"""mlx: `adapters.safetensors` and `adapter_config.json` of mlx-lm.

Its factors are the transposes of ours, and it has one rank and one scale for all: lower ranks get zeros, and what
differs in scale goes into `lora_b`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import peft
from lora_fx.exporters.features import expressed, refusals
from lora_fx.exporters.plain import Pair, pairs
from lora_fx.exporters.running import largest_difference, outputs_of, run_client
from lora_fx.exporters.target import Refusal, Target
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.samples import Sample
from lora_fx.tuned.undo import disabled, removed

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
MODEL_TYPES = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")
"""Those whose modules have the same names in mlx-lm and compute the same (compared, tiny, with mlx-lm 0.32)."""
_MERGE = "; mlx-lm converts merged weights: target='merged'"
REFUSED = {
    "conv1d": f"mlx-lm has plain linears where transformers has Conv1D{_MERGE}",
    "convolution": f"mlx-lm has no adapters of convolutions{_MERGE}",
    "attention": f"mlx-lm has no nn.MultiheadAttention{_MERGE}",
    "parameter": f"mlx-lm adapts layers, not raw parameters{_MERGE}",
    "experts": f"mlx-lm lays out the experts otherwise{_MERGE}",
    "calls": f"mlx-lm has one adapter for all calls of a module{_MERGE}",
    "bias": f"mlx-lm loads lora_a and lora_b alone, no biases{_MERGE}",
    "train": f"mlx-lm loads lora_a and lora_b alone, no whole modules{_MERGE}",
}


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what mlx-lm does not load, or would compute otherwise."""
    config = _config(tuned)
    if config.get("model_type") not in MODEL_TYPES:
        yield (
            "",
            f"only models of transformers of type {', '.join(MODEL_TYPES)} are known to be the same in mlx-lm{_MERGE}",
        )
    yield from refusals(tuned, REFUSED)
    yield from peft.beyond_peft(tuned)
    sites = list(all_attached(tuned))
    mixed = len({found.spec.lora.dora for _, found in sites}) > 1
    for path, found in sites:
        if config.get("tie_word_embeddings") and ("embed" in path or path == "lm_head"):
            yield path, f"mlx-lm uses one tied layer as embedding and head, and would adapt both{_MERGE}"
        if mixed and found.spec.lora.dora:
            yield path, f"mlx-lm has either DoRA or plain LoRA in a file, not both{_MERGE}"


def _config(tuned: nn.Module) -> dict[str, Any]:
    try:
        found: dict[str, Any] = tuned.config.to_dict()  # type: ignore[union-attr, operator]
    except AttributeError:
        return {}
    return found


def write(tuned: nn.Module, path: Path) -> None:
    """Write the directory."""
    sites = list(pairs(tuned))
    rank, scale = max(each.rank for each in sites), sites[0].scaling
    tensors: dict[str, Tensor] = {}
    for each in sites:
        tensors |= _named(each.with_scaling(scale).with_rank(rank))
    layers = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": [each.path for each in sites]}
    kind = "lora" if sites[0].magnitude is None else "dora"
    config = {"fine_tune_type": kind, "num_layers": _config(tuned).get("num_hidden_layers"), "lora_parameters": layers}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    weights = canonical_safetensors(dict(sorted(tensors.items())), {"format": "mlx"})
    write_files({path / WEIGHTS: weights, path / CONFIG: text.encode()})


def _named(pair: Pair) -> dict[str, Tensor]:
    named = {f"{pair.path}.lora_a": pair.A.mT.contiguous(), f"{pair.path}.lora_b": pair.B.mT.contiguous()}
    return named if pair.magnitude is None else named | {f"{pair.path}.m": pair.magnitude}


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against mlx-lm on the same base: logits of the `input_ids`, adapter on and off."""
    ids = sample.kwargs.get("input_ids", *sample.args[:1])
    alone = Sample((), {"input_ids": ids})
    with tempfile.TemporaryDirectory() as folder:
        removed(tuned).save_pretrained(folder)  # type: ignore[operator]
        given = {"base": folder, "adapter": str(path), "ids": ids}
        found = run_client("mlx", "lora_fx.exporters.clients.mlx", given)
    with disabled(tuned):
        base = outputs_of(tuned, alone)[0]
    adapted = outputs_of(tuned, alone)[0]
    return largest_difference("mlx", [adapted, base], [found["adapted"], found["base"]])


TARGET = Target(
    name="mlx",
    writes="a directory",
    client="mlx-lm",
    refused=refused,
    write=write,
    verify=verify,
    extra="mlx",
    verify_needs=("mlx", "mlx_lm"),
    expresses=expressed(REFUSED, {"slices", "ranks", "alphas", "rslora", "adapters"}),
)
