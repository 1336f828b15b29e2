"""What PEFT adapts in models of transformers, by their type, where a configuration names nothing.

Source: PEFT 0.21, `peft/utils/constants.py`, TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING; r and alpha as in its
LoraConfig.
"""

import re

from lora_fx.rules.ruleset import LoRAConfig

_BY_TARGETS = {
    "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    "q v": "t5 mt5",
    "q v q_proj v_proj": "blip-2",
    "c_attn": "gpt2 gpt_bigcode",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "Wqkv": "mpt",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "q_proj v_proj fc1 fc2": "phi",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
}

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{kind: names.split() for names, kinds in _BY_TARGETS.items() for kind in kinds.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""`target_modules` by the `model_type` of a transformers model."""

DEFAULT_LORA = LoRAConfig(r=8, alpha=8)


def is_default_of_peft(kind: str, path: str) -> bool:
    """Whether PEFT would adapt the module at a path in a model of this type.

    >>> is_default_of_peft("llama", "model.layers.0.self_attn.q_proj"), is_default_of_peft("llama", "lm_head")
    (True, False)
    """
    targets = DEFAULT_TARGETS.get(kind, [])
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(f".{path}".endswith(f".{name}") for name in targets)
