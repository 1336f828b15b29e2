"""kohya: the file of sd-scripts, `lora_unet_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha`, read by ComfyUI too.

Dots of a path become underscores, so two paths may get one name.  Each layer has its own rank and could have its own
alpha, but diffusers loses the alphas of attention layers where they differ: all get one, and B the rest of the scaling.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import clients, peft
from lora_fx.exporters.plain import plain_adapters
from lora_fx.exporters.running import call_with, outputs_of_both, run_client, worst_difference
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.tuned.undo import removed

PREFIX = "lora_unet"
REFUSED = {
    "conv1d": f"readers take transformers' Conv1D for a convolution, or leave it out{peft.WAY_OUT}",
    "embedding": f"the format has no embeddings{peft.WAY_OUT}",
    "attention": f"the format has names for modules, not for parts of nn.MultiheadAttention{peft.WAY_OUT}",
    "parameter": f"the format has names for modules, not for raw parameters{peft.WAY_OUT}",
    "experts": f"the format has names for modules, not for banks of experts{peft.WAY_OUT}",
    "calls": f"the format has one adapter for all calls of a module{peft.WAY_OUT}",
    "dora": f"diffusers leaves out the `dora_scale` of a file, without an error{peft.WAY_OUT}",
    "bias": f"the format has no biases{peft.WAY_OUT}",
    "train": f"the format has no whole modules{peft.WAY_OUT}",
}


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what the format does not hold, or holds under a name of two modules."""
    yield from refusals(tuned, REFUSED)
    yield from peft.beyond_peft(tuned)
    names = Counter(_flat(name) for name, module in tuned.named_modules() if next(iter(module._parameters), None))
    for path, adapter in all_attached(tuned):
        if names[_flat(path)] > 1:
            yield path, f"another module gets its name, {_flat(path)}, as well{peft.WAY_OUT}"
        if adapter.spec.site.op.startswith("conv") and adapter.lora_B.weight.shape[1] != adapter.lora_A.weight.shape[0]:
            yield path, f"readers differ over the groups of a convolution{peft.WAY_OUT}"


def _flat(path: str) -> str:
    return path.replace(".", "_")


def write(tuned: nn.Module, path: Path, prefix: str = PREFIX) -> None:
    """Write the file, with one alpha for all layers."""
    adapters = list(plain_adapters(tuned))
    alpha = float(adapters[0].alpha)
    tensors = {}
    for adapter in adapters:
        name = f"{prefix}_{_flat(adapter.path)}"
        tensors[f"{name}.lora_down.weight"] = adapter.A
        tensors[f"{name}.lora_up.weight"] = adapter.with_scaling(alpha / adapter.rank).B
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    write_files({path: canonical_safetensors(dict(sorted(tensors.items())), {"format": "pt"})})


def verify(tuned: nn.Module, path: Path, sample: Sample) -> float:
    """Return max |Δ| of ours against diffusers for a UNet, against LyCORIS for other models, adapter on and off."""
    base, call = removed(tuned).eval(), call_with(sample)
    if "UNet2DCondition" in original_class(tuned).__name__:
        client = partial(clients.diffusers, base, path, "unet", call)
    else:
        client = partial(clients.lycoris, base, path, call)
    return worst_difference("kohya", outputs_of_both(tuned, sample), run_client("kohya", client))


TARGET = Target(
    name="kohya",
    writes="one file",
    client="LyCORIS, or diffusers for a UNet",
    refused=refused,
    write=write,
    verify=verify,
    extra="kohya",
    verify_needs=("lycoris",),
    expresses=expressed(REFUSED, {"slices", "alphas", "rslora", "adapters"}),
    options={"prefix": "of the names: `lora_unet` (default), `lora_te1`, `lora_te2`, `lora_transformer`"},
)
