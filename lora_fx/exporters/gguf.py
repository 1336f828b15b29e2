"""gguf: an adapter for llama.cpp.

The file has one alpha, and llama.cpp takes alpha / rank of each tensor as its scaling; where that is not a site's own,
the rest goes into its B.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.errors import ExportError
from lora_fx.exporters.gguf_layout import LAYOUTS, GgufLayout, permuted_rows
from lora_fx.exporters.program import call_of
from lora_fx.exporters.running import largest_difference, run_client
from lora_fx.exporters.target import Refusal, Target
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class
from lora_fx.tuned.build import record_in
from lora_fx.tuned.undo import disabled

_MERGE = "merge the adapter (target 'merged') and convert that model"
_MOST_WORDS = 1000
"""Of how many of the likeliest next words the probabilities are compared, where there are more."""


# -- what can be written


def _refused(tuned: nn.Module) -> Iterator[Refusal]:
    name = original_class(tuned).__name__
    layout = LAYOUTS.get(name)
    if layout is None:
        known = ", ".join(LAYOUTS)
        yield "", f"the layout of {name} in GGUF has not been tested, only that of {known}; {_MERGE}"
        return
    tied = _tied(tuned)
    for path, found in all_attached(tuned):
        reason = _reason(path, found, layout, path in tied)
        if reason is not None:
            yield path, f"{reason}; {_MERGE}"
    for path in record_in(tuned).trained:
        yield path, f"an adapter in GGUF holds no whole modules; {_MERGE}"


def _reason(path: str, found: Attached, layout: GgufLayout, tied: bool) -> str | None:
    """Return why a site's adapter cannot be written, or None."""
    spec = found.spec
    if spec.lora.dora:
        return "llama.cpp knows no DoRA"
    if spec.lora.bias and found.owner._parameters.get("bias") is not None:
        return "an adapter in GGUF holds no biases"
    if found.call is not None:
        return "llama.cpp has one adapter for all calls"
    if not spec.path_is_owner or layout.tensor(path) is None:
        return f"llama.cpp applies no adapter to it in the architecture '{layout.architecture}'"
    if tied:
        return "its weight is tied, and a GGUF file holds a tied weight once: the other use would be adapted too"
    return None


def _tied(tuned: nn.Module) -> set[str]:
    sites = record_in(tuned).plan.adapted
    return {each.path for each in sites if each.site.tied_to} | (
        {"lm_head", "model.embed_tokens"} if _config(tuned).tie_word_embeddings else set()
    )


def _config(tuned: nn.Module) -> Any:
    return tuned.config


# -- writing


@dataclass(frozen=True, slots=True)
class _Pair:
    """The factors of one site as llama.cpp has them, but for the scaling."""

    name: str
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    rank: int

    @property
    def alpha(self) -> float:
        """What alpha would have to be, without a rest in B."""
        return self.scaling * self.rank


def _write(tuned: nn.Module, path: Path, base: str | Path | None = None) -> None:
    layout = LAYOUTS[original_class(tuned).__name__]
    pairs = [_pair(layout, path_, found, _config(tuned)) for path_, found in all_attached(tuned)]
    alpha = _common(pair.alpha for pair in pairs)
    writer = importlib.import_module("gguf").GGUFWriter(path, layout.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for pair in pairs:
        rest = pair.alpha / alpha
        writer.add_tensor(f"{pair.name}.lora_a", _array(pair.lora_a))
        writer.add_tensor(f"{pair.name}.lora_b", _array(pair.lora_b if rest == 1 else pair.lora_b * rest))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pair(layout: GgufLayout, path: str, found: Attached, config: Any) -> _Pair:
    name = layout.tensor(path)
    assert name is not None
    A, B = found.lora_A.matrix.detach(), found.lora_B.matrix.detach()
    if found.spec.site.op == "embedding":  # llama.cpp looks tokens up in A, so it has it the other way round
        A = A.t()
    if layout.permuted and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_attention_heads if name.endswith("attn_q.weight") else config.num_key_value_heads
        B = permuted_rows(B, heads)
    return _Pair(name, A, B, found.spec.scaling, found.spec.rank)


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
    prompts = _prompts(tuned, sample)
    words = min(_config(tuned).vocab_size, _MOST_WORDS)
    given = {"base": str(base), "adapter": str(path), "prompts": prompts, "words": words}
    found = run_client("gguf", "lora_fx.exporters.clients.gguf", given)
    with disabled(tuned):
        before = _log_probabilities(tuned, prompts)
    return max(_difference(before, found[0]), _difference(_log_probabilities(tuned, prompts), found[1]))


def _prompts(tuned: nn.Module, sample: Sample) -> list[list[int]]:
    """Return the rows of the sample as lists of tokens, without padding; and the first half of each."""
    _, kwargs = call_of(tuned, sample)
    ids = kwargs["input_ids"]
    mask = kwargs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [*rows, *(row[: (len(row) + 1) // 2] for row in rows)]


@torch.no_grad()
def _log_probabilities(tuned: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Return the logarithms of the probabilities of every next word, for each prompt."""
    device = next(tuned.parameters()).device
    rows = (tuned(torch.tensor([prompt], device=device)).logits[0, -1] for prompt in prompts)
    return [row.float().log_softmax(-1).cpu() for row in rows]


def _difference(ours: list[Tensor], theirs: list[dict[int, float]]) -> float:
    values = [torch.tensor(list(each.values())) for each in theirs]
    chosen = [row[list(each)] for row, each in zip(ours, theirs, strict=True)]
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
    expresses={
        "linear": "yes",
        "conv1d": "refused",
        "convolution": "refused",
        "embedding": "yes",
        "attention": "refused",
        "parameter": "refused",
        "experts": "refused",
        "slices": "exact equivalent",
        "calls": "refused",
        "ranks": "yes",
        "alphas": "exact equivalent",
        "rslora": "exact equivalent",
        "dora": "refused",
        "bias": "refused",
        "train": "refused",
        "adapters": "exact equivalent",
    },
    options={"base": "for verifying: the base model as a GGUF file, in float32"},
    verify_options=("base",),
    tolerance=1e-2,
)
