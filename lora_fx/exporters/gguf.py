"""gguf: an adapter for llama.cpp.

The file has one alpha, and llama.cpp takes alpha / rank of a tensor as its scaling; where that is not a site's own,
the rest goes into its B.
"""

import errno
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.errors import ExportError
from lora_fx.exporters import clients
from lora_fx.exporters.plain import PlainAdapter, multiplied, plain_adapters
from lora_fx.exporters.program import call_of
from lora_fx.exporters.running import largest_difference, run_client, without_and_with
from lora_fx.exporters.target import Refusal, Target, expressed, refusals
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.tuned.build import record_in

_BESIDE = {
    "train": "an adapter in GGUF holds no whole modules",
    "tokens": "an adapter in GGUF holds no rows of embeddings",
    "bias": "an adapter in GGUF holds no biases",
}
_MERGE = "merge the adapter (target 'merged') and convert that model"
MOST_WORDS = 1000
"""Of how many of the likeliest next words the probabilities are compared, where there are more."""


# -- which tensor of a file is which weight: only what was run in llama.cpp and computed alike is in these tables
# (it loads an adapter for any tensor, also for one that it never adapts, and for one whose rows lie in another order)

_SEPARATE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How one architecture lies in a GGUF file."""

    architecture: str
    """What the file calls it."""
    blocks: dict[str, str]
    """Path in a layer → name in `blk.N`."""
    permuted: bool = False
    """Whether the rows of q and k are in the order of the original LLaMA's rotary embedding, not in transformers'."""

    def tensor(self, path: str) -> str | None:
        """Return the name of the weight of a site, or None if the file has none that an adapter may change."""
        if path in _ENDS:
            return f"{_ENDS[path]}.weight"
        match = _LAYER.fullmatch(path)
        name = self.blocks.get(match[2]) if match else None
        return None if match is None or name is None else f"blk.{match[1]}.{name}.weight"


LAYOUTS = {
    "LlamaForCausalLM": GgufLayout("llama", _SEPARATE, permuted=True),
    "MistralForCausalLM": GgufLayout("llama", _SEPARATE, permuted=True),
    "Qwen2ForCausalLM": GgufLayout("qwen2", _SEPARATE),
    "Qwen3ForCausalLM": GgufLayout("qwen3", _SEPARATE),
    "GemmaForCausalLM": GgufLayout("gemma", _SEPARATE),
    "Gemma2ForCausalLM": GgufLayout("gemma2", _SEPARATE),
    "Phi3ForCausalLM": GgufLayout("phi3", _FUSED),
}
"""By class of the model."""


def permuted_rows(rows: Tensor, heads: int) -> Tensor:
    """Return a matrix whose rows are those of q or k in the order that llama.cpp's `llama` has them.

    transformers rotates the first half of each head against the second; the original rotates neighbours.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return torch.transpose(halves, 1, 2).reshape(rows.shape)


# -- what can be written


def _refused(tuned: nn.Module) -> Iterator[Refusal]:
    name = original_class(tuned).__name__
    layout = LAYOUTS.get(name)
    if layout is None:
        known = ", ".join(LAYOUTS)
        yield "", f"the layout of {name} in GGUF has not been tested, only that of {known}; {_MERGE}"
        return
    tied = tied_paths(tuned)
    for path, adapter in all_attached(tuned):
        reason = _reason(path, adapter, layout, path in tied)
        if reason is not None:
            yield path, f"{reason}; {_MERGE}"
    yield from refusals(tuned, {feature: f"{reason}; {_MERGE}" for feature, reason in _BESIDE.items()})


def _reason(path: str, adapter: Attached, layout: GgufLayout, tied: bool) -> str | None:
    """Return why a site's adapter cannot be written, or None."""
    spec = adapter.spec
    if spec.lora.dora:
        return "llama.cpp knows no DoRA"
    if spec.lora.invocation:
        return "llama-server alone looks for an invocation; others would act on every token; target='peft' has it"
    if adapter.trained_bias is not None:
        return _BESIDE["bias"]
    if adapter.call is not None:
        return "llama.cpp has one adapter for all calls"
    if not spec.path_is_owner or layout.tensor(path) is None:
        return f"llama.cpp applies no adapter to it in the architecture '{layout.architecture}'"
    if tied:
        return "its weight is tied, and a GGUF file holds a tied weight once: the other use would be adapted too"
    return None


def tied_paths(tuned: nn.Module) -> set[str]:
    """Return the paths of the weights that have another use; a file holds each once."""
    sites = record_in(tuned).plan.adapted
    return {planned.path for planned in sites if planned.site.tied_to} | (
        {"lm_head", "model.embed_tokens"} if config_of(tuned).tie_word_embeddings else set()
    )


def config_of(tuned: nn.Module) -> Any:
    """Return the settings of a model of transformers."""
    return tuned.config


# -- writing


def _write(tuned: nn.Module, path: Path, base: str | Path | None = None) -> None:
    layout = LAYOUTS[original_class(tuned).__name__]
    adapters = list(plain_adapters(tuned))
    alpha = _common(adapter.alpha for adapter in adapters)
    writer = importlib.import_module("gguf").GGUFWriter(path, layout.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for adapter in adapters:
        name, rest = layout.tensor(adapter.path), adapter.alpha / alpha
        assert name is not None
        A, B = _laid_out(adapter, name, layout, config_of(tuned))
        writer.add_tensor(f"{name}.lora_a", _array(A))
        writer.add_tensor(f"{name}.lora_b", _array(multiplied(B, rest)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    write_tensors(writer)


def write_tensors(writer: Any) -> None:
    """Write the tensors of a `GGUFWriter` and end its files.

    numpy hands on what it writes through a buffer of its own, and says nothing where the last of it finds no room.

    Raises:
        OSError: a file is shorter than what was written to it.
    """
    writer.write_tensors_to_file()
    ends = [(Path(file.name), file.tell()) for file in writer.fout]
    writer.close()
    for path, end in ends:
        if path.stat().st_size < end:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def _laid_out(adapter: PlainAdapter, name: str, layout: GgufLayout, config: Any) -> tuple[Tensor, Tensor]:
    """Return A and B as llama.cpp has them, but for the scaling."""
    A, B = adapter.A, adapter.B
    if name == f"{_ENDS['model.embed_tokens']}.weight":  # llama.cpp looks tokens up in A: it is the other way round
        A = A.t()
    return A, as_stored(B, name, layout, config)


def as_stored(rows: Tensor, name: str, layout: GgufLayout, config: Any) -> Tensor:
    """Return a matrix [out, …] with its rows in the order that a tensor of the file has them."""
    if not layout.permuted or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return rows
    heads = config.num_attention_heads if name.endswith("attn_q.weight") else config.num_key_value_heads
    return permuted_rows(rows, heads)


def _common(alphas: Iterable[float]) -> float:
    """Return the most common alpha, the smallest of them in a tie."""
    counted = Counter(alphas)
    return min(counted, key=lambda alpha: (-counted[alpha], alpha))


def _array(tensor: Tensor) -> Any:
    return tensor.float().cpu().contiguous().numpy()


# -- in llama.cpp


def _verify(tuned: nn.Module, path: Path, sample: Sample, base: str | Path | None = None) -> float:
    if base is None:
        raise ExportError(
            "gguf", "llama.cpp needs the base model as a GGUF file", advice="give base='model.gguf', in float32"
        )
    prompts = prompts_in(tuned, sample)
    words = min(config_of(tuned).vocab_size, MOST_WORDS)
    theirs = run_client("gguf", partial(clients.gguf, Path(base), path, prompts, words))
    ours = without_and_with(tuned, lambda: log_probabilities(tuned, prompts))
    return max(map(difference, ours, theirs))


def prompts_in(tuned: nn.Module, sample: Sample) -> list[list[int]]:
    """Return the rows of a sample as lists of tokens, without padding; and the first half of each."""
    _, kwargs = call_of(tuned, sample)
    ids = kwargs["input_ids"]
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [*rows, *(row[: (len(row) + 1) // 2] for row in rows)]


@torch.no_grad()
def log_probabilities(tuned: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Return the logarithms of the probabilities of every next word, for each prompt."""
    device = next(tuned.parameters()).device
    rows = (tuned(torch.tensor([prompt], device=device)).logits[0, -1] for prompt in prompts)
    return [row.float().log_softmax(-1).cpu() for row in rows]


def difference(ours: list[Tensor], theirs: list[dict[int, float]]) -> float:
    values = [torch.tensor(list(words.values())) for words in theirs]
    chosen = [row[list(words)] for row, words in zip(ours, theirs, strict=True)]
    return largest_difference("gguf", chosen, values)


TARGET = Target(
    name="gguf",
    writes="one file, an adapter for `llama-cli --lora`",
    client="llama.cpp",
    refused=_refused,
    write=_write,
    verify=_verify,
    extra="gguf",
    needs=("gguf",),
    verify_needs=("xllamacpp",),
    expresses=expressed(
        {"conv1d", "convolution", "attention", "parameter", "experts", "calls", "dora", "invocation", *_BESIDE},
        {"slices", "alphas", "rslora", "adapters"},
    ),
    options={"base": "for verifying: the base model as a GGUF file, in float32"},
    verify_options=("base",),
    tolerance=1e-2,
)
