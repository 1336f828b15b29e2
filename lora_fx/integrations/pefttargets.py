"""What PEFT adapts where a configuration does not say it.

Source: PEFT 0.21, `peft/utils/constants.py` (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, EMBEDDING_LAYER_NAMES,
SEQ_CLS_HEAD_NAMES) and `peft/peft_model.py` (the heads that a task adds to modules_to_save).
"""

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

ALL_LINEAR = "all-linear"
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Names of layers that PEFT takes for tied."""
CLASSIFIERS = ("score", "classifier")
"""Heads that "all-linear" leaves out of a classifier, the first that is there."""
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What a task adds to `modules_to_save`."""
FUSED_IN_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
"""Linears of experts that newer transformers hold in banks: PEFT changes a configuration that names them."""
