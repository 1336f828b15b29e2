"""Tiny random language models as transformers and as GGUF base files: enough for llama.cpp to run both alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

VOCABULARY = 64
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "Llama": UNTIED,
    "Mistral": {**UNTIED, "head_dim": 16, "sliding_window": None},
    "Qwen2": UNTIED,
    "Qwen3": {**UNTIED, "head_dim": 32},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "Phi3": UNTIED,
}
"""Of each architecture: its settings beyond the sizes."""
_GGUF = {"Mistral": "llama"}
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_GEMMA2_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_LINEARS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def language_model(kind: str, **settings: Any) -> nn.Module:
    """Return a tiny model with random weights, norms and biases, always the same."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **SETTINGS[kind], **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_base(kind: str, model: nn.Module, path: Path, head: str = "F32") -> None:
    """Write the model as a GGUF file in float32, its head in another type, with a vocabulary of meaningless words."""
    writer = gguf.GGUFWriter(path, _GGUF.get(kind, kind.lower()))
    _write_settings(writer, kind, model.config)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module, _, last = name.rpartition(".")
        value = _as_stored(kind, model.config, module, value)
        stored = gguf.GGMLQuantizationType[head if module == "lm_head" else "F32"]
        array = gguf.quantize(value.float().contiguous().numpy(), stored)
        writer.add_tensor(f"{_tensor_name(kind, module)}.{last}", array, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: Any, kind: str, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if kind == "Gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, config.vocab_size))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *(1 for _ in range(3, config.vocab_size))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensor_name(kind: str, module: str) -> str:
    if module in _ENDS:
        return _ENDS[module]
    _, _, number, inner = module.split(".", 3)
    names = {**_LINEARS, **(_GEMMA2_NORMS if kind == "Gemma2" else _NORMS)}
    return f"blk.{number}.{names[inner]}"


def _as_stored(kind: str, config: Any, module: str, value: Tensor) -> Tensor:
    """Return a weight as llama.cpp has it: Gemma's norms one larger, LLaMA's rotary rows side by side."""
    if kind.startswith("Gemma") and "norm" in module:
        return value + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.split(".")[-1])
    if kind in ("Llama", "Mistral") and heads:
        size = value.shape[0] // heads
        order = [
            head * size + half * size // 2 + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
        ]
        return value[order]
    return value


def prompts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator)}
