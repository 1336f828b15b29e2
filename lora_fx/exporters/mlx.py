"""mlx: `adapters.safetensors` and `adapter_config.json` of mlx-lm.

Its factors are the transposes of ours, and it has one rank and one scale for all: lower ranks get zeros, and what
differs in scale goes into `lora_b`.
"""

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import clients, peft
from lora_fx.exporters.plain import evened
from lora_fx.exporters.running import outputs_of_both, run_client, worst_difference
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.samples import Sample
from lora_fx.tuned.undo import removed

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
    "invocation": "mlx-lm knows no tokens from which on an adapter acts; target='peft' has them",
    "bias": f"mlx-lm loads lora_a and lora_b alone, no biases{_MERGE}",
    "train": f"mlx-lm loads lora_a and lora_b alone, no whole modules{_MERGE}",
    "tokens": f"mlx-lm loads lora_a and lora_b alone, no rows of embeddings{_MERGE}",
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
    mixed = len({adapter.spec.lora.dora for _, adapter in sites}) > 1
    for path, adapter in sites:
        if config.get("tie_word_embeddings") and ("embed" in path or path == "lm_head"):
            yield path, f"mlx-lm uses one tied layer as embedding and head, and would adapt both{_MERGE}"
        if mixed and adapter.spec.lora.dora:
            yield path, f"mlx-lm has either DoRA or plain LoRA in a file, not both{_MERGE}"
        if adapter.spec.lora.dora and adapter.spec.site.op == "embedding":
            yield path, f"mlx-lm's DoRA of an embedding has a length for each token, not for each dimension{_MERGE}"


def _config(tuned: nn.Module) -> dict[str, Any]:
    try:
        config: dict[str, Any] = tuned.config.to_dict()  # type: ignore[union-attr, operator]
    except AttributeError:
        return {}
    return config


def write(tuned: nn.Module, path: Path) -> None:
    """Write the directory."""
    adapters = evened(tuned)
    first = adapters[0]
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        tensors[f"{adapter.path}.lora_a"] = adapter.A.mT.contiguous()
        tensors[f"{adapter.path}.lora_b"] = adapter.B.mT.contiguous()
        if adapter.magnitude is not None:
            tensors[f"{adapter.path}.m"] = adapter.magnitude
    keys = [adapter.path for adapter in adapters]
    layers = {"rank": first.rank, "scale": first.scaling, "dropout": 0.0, "keys": keys}
    kind = "lora" if first.magnitude is None else "dora"
    config = {"fine_tune_type": kind, "num_layers": _config(tuned).get("num_hidden_layers"), "lora_parameters": layers}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    weights = canonical_safetensors(dict(sorted(tensors.items())), {"format": "mlx"})
    write_files({path / WEIGHTS: weights, path / CONFIG: text.encode()})


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against mlx-lm on the same base: logits of the `input_ids`, adapter on and off."""
    ids = sample.kwargs.get("input_ids", *sample.args[:1])
    alone = Sample((), {"input_ids": ids})
    with tempfile.TemporaryDirectory() as folder:
        removed(tuned).save_pretrained(folder)  # type: ignore[operator]
        theirs = run_client("mlx", partial(clients.mlx, Path(folder), path, ids))
    return worst_difference("mlx", [outputs[:1] for outputs in outputs_of_both(tuned, alone)], theirs)


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
