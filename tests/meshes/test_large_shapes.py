"""Shapes that no machine here could hold, counted from a configuration."""

from __future__ import annotations

import json

import pytest
import torch

import lora_fx
from lora_fx.bench.counters import flops
from tests.support.clitools import run

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
LLAMA_405B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 16384,
    "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
"""Llama 3.1 405B (arXiv:2407.21783, table 3)."""
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
    "topk_group": 4, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
    "v_head_dim": 128, "first_k_dense_replace": 3, "vocab_size": 129280, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
"""DeepSeek-V3 (arXiv:2412.19437, §4.2)."""


@pytest.mark.parametrize(
    ("config", "parameters", "computing"),
    [
        pytest.param(LLAMA_405B, 405_853_388_800, 405.85e9 - 2.1e9, id="llama"),
        pytest.param(DEEPSEEK_V3, 671_026_419_200, 36.6e9, id="deepseek", marks=pytest.mark.fuzz),
    ],
)
def test_a_device_has_its_part_of_hundreds_of_billions_of_parameters(config, parameters, computing, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = ("plan", f"hf:{tmp_path}", "qkvo", "--mesh", "dp=8,tp=4", "--tokens", "1x1024", "--format", "json")
    result = run(*asked)
    assert result.exit_code == 0, result.output
    budget = json.loads(result.output)
    assert budget["devices"] == 32
    products = 4 * computing * 1024  # of both passes, the base frozen
    assert budget["plain"]["flops"] >= products / 4
    assert budget["checkpointed"]["kept"] < budget["plain"]["kept"] / 5
    assert lora_fx.Mesh.of("dp=8,tp=4").devices == 32
    assert budget["weights"] >= 2 * parameters / 32


def test_experts_in_float32_and_trained_biases_of_attention_are_counted():
    """On the meta device torch multiplies groups in bfloat16 alone, and its kernels give a mask no gradient."""
    sizes = {"num_attention_heads": 4, "vocab_size": 64}
    mixtral = transformers.MixtralConfig(
        **sizes, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4
    )
    mixtral._experts_implementation = "grouped_mm"
    t5 = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0, decoder_start_token_id=0
    )
    ids = torch.arange(32).reshape(2, 16)
    given = {"input_ids": ids, "labels": ids, "use_cache": False}
    for kind, config, sites in (
        (transformers.MixtralForCausalLM, mixtral, "**.{q,v}_proj"),
        (transformers.T5ForConditionalGeneration, t5, "**.{q,v,relative_attention_bias}"),
    ):
        rules = {"version": 1, "rules": [{"match": {"name": sites}, "lora": {"r": 4, "alpha": 4}}]}
        tuned = lora_fx.apply(kind(config), rules, backend="modules").train()
        real = flops(lambda tuned=tuned: tuned(**given).loss.backward())
        assert lora_fx.budget(kind(config), rules, given).plain.flops == real
    with pytest.raises(lora_fx.RefusedError, match=r"decoder\.block\.0 +is given what the block before has not made"):
        lora_fx.budget(kind(config), rules, given, mesh="pp=2")
