"""peft: `adapter_config.json` and `adapter_model.safetensors`, what `lora_fx.save` writes, checked in PEFT itself."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import nn

from lora_fx.adapters.attach import all_attached, owner_path
from lora_fx.errors import AdapterFileError
from lora_fx.exporters import clients
from lora_fx.exporters.running import call_with, largest_difference, outputs_of_both, run_client, worst_difference
from lora_fx.exporters.target import Refusal, Target, expressed, features
from lora_fx.files.adapter.describe import beyond_peft as sites_beyond_peft
from lora_fx.files.adapter.describe import describe
from lora_fx.files.adapter.write import save
from lora_fx.models.samples import Sample
from lora_fx.tuned.build import record_in
from lora_fx.tuned.undo import removed

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


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against PeftModel.from_pretrained on the same base, with the adapter on and off."""
    others = [described.name for described in describe(tuned)][1:]
    client = partial(clients.peft, removed(tuned).eval(), path, others, call_with(sample))
    ours, theirs = outputs_of_both(tuned, sample), run_client("peft", client)
    if record_in(tuned).trained or any(feature == "bias" for feature, _ in features(tuned)):
        return largest_difference("peft", ours[1], theirs[1])  # PEFT cannot switch these off
    return worst_difference("peft", ours, theirs)


TARGET = Target(
    name="peft",
    writes="a directory",
    client="PEFT",
    refused=refused,
    write=save,
    verify=verify,
    several="each",
    extra="export",
    verify_needs=("peft",),
    expresses=expressed({"calls"}, {"slices", "parameter", "experts", "adapters"}),
)
