"""What PEFT adapts where a configuration does not say it.

Source: PEFT 0.21, `peft/utils/constants.py` (EMBEDDING_LAYER_NAMES, SEQ_CLS_HEAD_NAMES); the heads that a task adds to
modules_to_save are in `files/adapter/names.py`, targets by model type in `planning/draft/peftdefaults.py`.
"""

ALL_LINEAR = "all-linear"
EMBEDDINGS = ("embed_tokens", "lm_head")
"""Names of layers that PEFT takes for tied."""
CLASSIFIERS = ("score", "classifier")
"""Heads that "all-linear" leaves out of a classifier, the first that is there."""
FUSED_IN_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})
"""Linears of experts that newer transformers hold in banks: PEFT changes a configuration that names them."""
