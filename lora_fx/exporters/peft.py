"""peft: `adapter_config.json` and `adapter_model.safetensors`, what `lora_fx.save` writes, checked in PEFT itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached, owner_path
from lora_fx.errors import AdapterFileError
from lora_fx.exporters.features import expressed, features
from lora_fx.exporters.running import given_sample, largest_difference, outputs_of, run_client
from lora_fx.exporters.target import Refusal, Target
from lora_fx.files.adapter.describe import beyond_peft as sites_beyond_peft
from lora_fx.files.adapter.describe import describe
from lora_fx.files.adapter.write import save
from lora_fx.models.samples import Sample
from lora_fx.tuned.build import record_in
from lora_fx.tuned.undo import disabled, removed

WAY_OUT = "; merged weights hold it: target='merged'"


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what PEFT would compute otherwise."""
    yield from beyond_peft(tuned)
    try:
        describe(tuned)
    except AdapterFileError as error:  # DoRA and plain LoRA in one adapter
        reason = "is beside DoRA, for which PEFT has one switch; give it an adapter of its own (`adapter:`)"
        yield from ((path, f"{kind} {reason}") for path, kind in error.facts)


def beyond_peft(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for the sites that PEFT's layers cannot be put at."""
    yield from ((path, reason + WAY_OUT) for path, reason in sites_beyond_peft(tuned))
    for path, adapter in all_attached(tuned):
        if not owner_path(path, adapter):
            yield path, f"PEFT cannot adapt what the model itself owns, only what a module in it does{WAY_OUT}"


def write(tuned: nn.Module, path: Path) -> None:
    """Write the directory that `lora_fx.save` writes."""
    save(tuned, path)


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against PeftModel.from_pretrained on the same base, with the adapter on and off."""
    others = [described.name for described in describe(tuned)][1:]
    given = {"base": removed(tuned).eval(), "folder": str(path), "others": others, "sample": given_sample(sample)}
    results = run_client("peft", "lora_fx.exporters.clients.peft", given)
    whole = not record_in(tuned).trained and all(feature != "bias" for feature, _ in features(tuned))
    return against_both("peft", tuned, sample, results["adapted"], results["base"] if whole else None)


def against_both(
    target: str, tuned: nn.Module, sample: Sample, adapted: list[Tensor], base: list[Tensor] | None
) -> float:
    """Return max |Δ| of our outputs against a client's, with the adapter and, where it can be switched off, without."""
    difference = largest_difference(target, outputs_of(tuned, sample), adapted)
    if base is None:
        return difference
    with disabled(tuned):
        return max(difference, largest_difference(target, outputs_of(tuned, sample), base))


TARGET = Target(
    name="peft",
    writes="a directory",
    client="PEFT",
    refused=refused,
    write=write,
    verify=verify,
    extra="export",
    verify_needs=("peft",),
    expresses=expressed({"calls"}, {"slices", "parameter", "experts", "adapters"}),
)
