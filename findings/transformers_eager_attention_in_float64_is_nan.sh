#!/usr/bin/env bash
# Who:       transformers 5.23.0 (torch 2.13.0), attn_implementation="eager", a model in float64.
# What:      a sequence with padding on the left gives NaN logits, all of it: the mask holds the least float64, and the
#            softmax is asked for in float32, where that is -inf; a token of padding attends to nothing, becomes NaN,
#            and 0 · NaN is NaN for the tokens after it. Where windows slide (Gemma 2), padding on the right does too.
# Expected:  numbers, as float32 has.
# Seen:      Llama    left     float64 NaN   float32 finite
#            Gemma2   left     float64 NaN   float32 finite
#            Gemma2   right    float64 NaN   float32 finite
# Way out:   float32; where a model has it, attn_implementation="sdpa".
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}
MODELS = {
    "Llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "Gemma2": (Gemma2ForCausalLM, Gemma2Config(**SIZES, sliding_window=4)),
}
IDS = torch.arange(1, 19).reshape(2, 9)


def logits(name: str, side: str, dtype: torch.dtype) -> torch.Tensor:
    kind, config = MODELS[name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    mask = torch.ones_like(IDS)
    mask[0, slice(None, 5) if side == "left" else slice(4, None)] = 0
    with torch.no_grad():
        return kind(config).to(dtype).eval()(input_ids=IDS, attention_mask=mask).logits


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")))
seen = []
for name, side in (("Llama", "left"), ("Gemma2", "left"), ("Gemma2", "right")):
    words = [f"{name:<7} {side:<6}"]
    for dtype in (torch.float64, torch.float32):
        rows = logits(name, side, dtype).isnan().flatten(1)
        told = "NaN" if rows[0].all() and not rows[1].any() else "finite" if not rows.any() else "some NaN"
        words.append(f"{str(dtype)[6:]} {told}")
        seen.append(told)
    print("   ".join(words))
sys.exit(seen != ["NaN", "finite"] * 3)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
