"""diffusers: `pytorch_lora_weights.safetensors`, with the ranks and alphas in its metadata.

Where it does not read them (`model.load_lora_adapter(file)`), diffusers takes alpha = rank, and says nothing: so alpha
is the rank here, and B has the scaling in it.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.errors import ExportError
from lora_fx.exporters import clients, peft
from lora_fx.exporters.plain import multiplied
from lora_fx.exporters.running import call_with, outputs_of_both, run_client, worst_difference
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.files.adapter.describe import describe
from lora_fx.files.adapter.names import PREFIX, factor_key
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.models.wrappers import without_wrappers
from lora_fx.tuned.undo import removed

WEIGHTS = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_MERGE = "; the merged model loads there: target='merged'"
REFUSED = {
    "embedding": f"diffusers takes the factors of embeddings for something else{_MERGE}",
    "attention": f"diffusers has no names for parts of nn.MultiheadAttention{_MERGE}",
    "parameter": f"diffusers adapts layers, not raw parameters{_MERGE}",
    "experts": f"diffusers adapts layers, not banks of experts{_MERGE}",
    "calls": f"diffusers has one adapter for all calls of a module{_MERGE}",
    "invocation": "diffusers knows no tokens from which on an adapter acts; target='peft' has them",
    "bias": f"diffusers does not load trained biases{_MERGE}",
    "train": f"diffusers does not load modules that were trained whole{_MERGE}",
    "tokens": f"diffusers does not load rows of embeddings{_MERGE}",
    "adapters": "one file holds one adapter; give all rules one `adapter:`",
}
_COMPONENTS = {"UNet": "unet", "Transformer": "transformer", "UVit": "transformer"}
"""What pipelines call a model, by a part of its class's name."""
_CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "use_rslora", "bias")


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what diffusers does not load, or would compute otherwise."""
    if not any("load_lora_adapter" in vars(kind) for kind in type(tuned).__mro__):
        yield "", f"{type(tuned).__name__} is not a diffusers model that loads adapters; target='peft' fits any model"
    yield from refusals(tuned, REFUSED)
    yield from peft.beyond_peft(tuned)


def _component_of(tuned: nn.Module) -> str:
    """Return what pipelines call a model: `unet`, or `transformer`.

    Raises:
        ExportError: it is neither; diffusers passes over a file for another component without a word.
    """
    name = original_class(tuned).__name__
    known = next((component for part, component in _COMPONENTS.items() if part in name), None)
    if known is None:
        advice = "give component='controlnet', or what it is"
        raise ExportError("diffusers", f"what pipelines call a {name} is not known", advice=advice)
    return known


def write(tuned: nn.Module, path: Path, component: str = "") -> None:
    """Write the file into the directory, or as the path where that ends in `.safetensors`."""
    (described,) = describe(tuned)
    component = component or _component_of(tuned)
    scalings = {factor_key(without_wrappers(path), "lora_B"): a.spec.scaling for path, a in all_attached(tuned)}
    folded = {key: multiplied(value, scalings.get(key, 1.0)) for key, value in described.tensors.items()}
    tensors = {f"{component}.{key.removeprefix(PREFIX)}": value for key, value in folded.items()}
    ranks = {"r": described.config["r"], "rank_pattern": described.config["rank_pattern"]}
    alphas = {"lora_alpha": ranks["r"], "alpha_pattern": ranks["rank_pattern"], "use_rslora": False}
    config = {
        f"{component}.{key}": value for key, value in (described.config | ranks | alphas).items() if key in _CONFIG
    }
    metadata = {"format": "pt", METADATA: json.dumps(config, sort_keys=True)}
    write_files({_file_in(path): canonical_safetensors(tensors, metadata)})


def _file_in(path: Path) -> Path:
    """Return the file that is meant by the path of an export."""
    return path if path.suffix == ".safetensors" else path / WEIGHTS


def verify(tuned: nn.Module, path: Path, sample: Sample, component: str = "") -> float:
    """Return max |Δ| of ours against `load_lora_adapter` on the same base, with the adapter on and off."""
    base, component = removed(tuned).eval(), component or _component_of(tuned)
    client = partial(clients.diffusers, base, _file_in(path), component, call_with(sample))
    return worst_difference("diffusers", outputs_of_both(tuned, sample), run_client("diffusers", client))


TARGET = Target(
    name="diffusers",
    writes="a directory, or one file",
    client="diffusers",
    refused=refused,
    write=write,
    verify=verify,
    extra="diffusers",
    verify_needs=("diffusers", "peft"),
    expresses=expressed(REFUSED, {"slices"}),
    options={"component": "what the pipeline calls the model: `unet`, `transformer` (found by the class)"},
    verify_options=("component",),
)
