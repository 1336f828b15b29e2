"""Which tensor of a GGUF file is which weight of a transformers model, for architectures that were run in llama.cpp.

llama.cpp loads an adapter for any tensor of its base, also for one that its graph never multiplies by an adapter, and
for one whose rows lie in another order; so only what tests have shown to be computed alike is in these tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
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
        found = _LAYER.fullmatch(path)
        name = self.blocks.get(found[2]) if found else None
        return None if found is None or name is None else f"blk.{found[1]}.{name}.weight"


_SEPARATE = {**_ATTENTION, **_MLP}
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
