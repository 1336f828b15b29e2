"""kohya: the file of sd-scripts, `lora_unet_<path>.lora_down.weight`, `.lora_up.weight`, `.alpha`, read by ComfyUI too.

DoRA's lengths are its `dora_scale` [out, 1…].  Dots of a path become underscores, so two paths may get one name, and
readers guess which were dots.  Each layer has its own rank and could have its own alpha, but diffusers loses the alphas
of attention layers where they differ: all get one, and B the rest of the scaling.  Of a text encoder diffusers reads q,
k and v only beside an out_proj: where none is adapted, one of zeros is added.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import clients, peft
from lora_fx.exporters.plain import PlainAdapter, plain_adapters
from lora_fx.exporters.running import call_with, outputs_of_both, run_client, worst_difference
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.files.atomic import write_files
from lora_fx.files.values import canonical_safetensors
from lora_fx.models.packed import held_weight
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.tuned.undo import removed

_COMPONENTS = {"lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
"""What pipelines call a text encoder, by the prefix of its names."""
_QKV = (".q_proj", ".k_proj", ".v_proj")
_OF_TEXT = (*_QKV, ".out_proj", ".fc1", ".fc2")
"""Ends of the paths that diffusers 0.42 reads in CLIP's text encoder."""
_OF_UNET = frozenset(
    ["conv_in", "conv_out", "conv_shortcut", "down_blocks", "linear_1", "linear_2", "mid_block", "proj_in", "proj_out",
     "time_emb_proj", "time_embedding", "to_k", "to_out", "to_q", "to_v", "transformer_blocks", "up_blocks"]
)  # fmt: skip
"""Parts of paths whose underscores diffusers 0.42 puts back; the layers of other parts it drops, with a warning."""
REFUSED = {
    "conv1d": f"readers take transformers' Conv1D for a convolution, or leave it out{peft.WAY_OUT}",
    "embedding": f"the format has no embeddings{peft.WAY_OUT}",
    "attention": f"the format has names for modules, not for parts of nn.MultiheadAttention{peft.WAY_OUT}",
    "parameter": f"the format has names for modules, not for raw parameters{peft.WAY_OUT}",
    "experts": f"the format has names for modules, not for banks of experts{peft.WAY_OUT}",
    "calls": f"the format has one adapter for all calls of a module{peft.WAY_OUT}",
    "invocation": "the format has no tokens from which on an adapter acts; target='peft' has them",
    "bias": f"the format has no biases{peft.WAY_OUT}",
    "train": f"the format has no whole modules{peft.WAY_OUT}",
    "tokens": f"the format has no rows of embeddings{peft.WAY_OUT}",
}


_IN_DIFFUSERS = {
    "dora": f"diffusers leaves out the `dora_scale` of a file of a UNet or CLIP, without an error{peft.WAY_OUT}"
}


def refused(tuned: nn.Module) -> Iterator[Refusal]:
    """Yield (path, reason) for what the format does not hold, or holds under a name of two modules."""
    yield from refusals(tuned, REFUSED | _IN_DIFFUSERS if _is_text(tuned) or _is_unet(tuned) else REFUSED)
    yield from peft.beyond_peft(tuned)
    names = Counter(_flat(name) for name, module in tuned.named_modules() if next(iter(module._parameters), None))
    for path, adapter in all_attached(tuned):
        if not _is_read(path, tuned):
            yield path, f"diffusers drops it when it reads a file of this format{peft.WAY_OUT}"
        if names[_flat(path)] > 1:
            yield path, f"another module gets its name, {_flat(path)}, as well{peft.WAY_OUT}"
        if adapter.spec.site.op.startswith("conv") and adapter.lora_B.weight.shape[1] != adapter.lora_A.weight.shape[0]:
            yield path, f"readers differ over the groups of a convolution{peft.WAY_OUT}"


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _is_read(path: str, tuned: nn.Module) -> bool:
    """Whether diffusers finds the layer of a UNet or a text encoder again by its name in the file."""
    if _is_text(tuned):
        return path.endswith(_OF_TEXT)
    return not _is_unet(tuned) or all("_" not in part or part in _OF_UNET for part in path.split("."))


def _is_text(tuned: nn.Module) -> bool:
    return "CLIPText" in original_class(tuned).__name__


def _is_unet(tuned: nn.Module) -> bool:
    return "UNet2DCondition" in original_class(tuned).__name__


def _prefix_of(tuned: nn.Module) -> str:
    """Return the prefix of the names that readers know a model by."""
    text = "lora_te2" if "Projection" in original_class(tuned).__name__ else "lora_te1"
    return text if _is_text(tuned) else "lora_unet"


def write(tuned: nn.Module, path: Path, prefix: str = "") -> None:
    """Write the file, with one alpha for all layers."""
    adapters = list(plain_adapters(tuned))
    written = torch.tensor(adapters[0].alpha, dtype=torch.float32)
    alpha = float(written)
    before = f"{prefix or _prefix_of(tuned)}_"
    if _is_text(tuned):
        adapters += _projection_beside(adapters, tuned)
        before += "text_model_" if "text_model" not in tuned._modules else ""  # its name until transformers 5
    tensors = {}
    for adapter in adapters:
        name = f"{before}{_flat(adapter.path)}"
        tensors[f"{name}.lora_down.weight"] = adapter.A
        tensors[f"{name}.lora_up.weight"] = adapter.with_scaling(alpha / adapter.rank).B
        tensors[f"{name}.alpha"] = written.clone()
        if adapter.magnitude is not None:
            ones = (1 for _ in adapter.A.shape[1:])
            tensors[f"{name}.dora_scale"] = adapter.magnitude.reshape(-1, *ones)
    write_files({path: canonical_safetensors(dict(sorted(tensors.items())), {"format": "pt"})})


def _projection_beside(adapters: Sequence[PlainAdapter], tuned: nn.Module) -> Iterator[PlainAdapter]:
    """Yield an adapter of zeros for one out_proj, where q, k or v are adapted and none is."""
    beside = [adapter for adapter in adapters if adapter.path.endswith(_QKV)]
    if beside and not any(adapter.path.endswith(".out_proj") for adapter in adapters):
        path, rank = f"{beside[0].path.rpartition('.')[0]}.out_proj", beside[0].rank
        out, inner = held_weight(tuned.get_submodule(path), "weight").shape
        like = beside[0].A
        yield PlainAdapter(path, like.new_zeros(rank, inner), like.new_zeros(out, rank), 1.0)


def verify(tuned: nn.Module, path: Path, sample: Sample, prefix: str = "") -> float:
    """Return max |Δ| of ours against diffusers for a UNet and CLIP's text encoder, else against LyCORIS, on and off."""
    base, call = removed(tuned).eval(), call_with(sample)
    component = _COMPONENTS.get(prefix or _prefix_of(tuned), "unet")
    if _is_text(tuned) or _is_unet(tuned):
        client = partial(clients.diffusers, base, path, component, call)
    else:
        client = partial(clients.lycoris, base, path, call)
    return worst_difference("kohya", outputs_of_both(tuned, sample), run_client("kohya", client))


TARGET = Target(
    name="kohya",
    writes="one file",
    client="LyCORIS; diffusers for a UNet and CLIP",
    refused=refused,
    write=write,
    verify=verify,
    extra="kohya",
    verify_needs=("lycoris",),
    expresses=expressed(REFUSED, {"slices", "alphas", "rslora", "adapters"}),
    options={"prefix": "of the names: `lora_te1` or `lora_te2` for CLIP, else `lora_unet`; `lora_transformer`"},
    verify_options=("prefix",),
)
