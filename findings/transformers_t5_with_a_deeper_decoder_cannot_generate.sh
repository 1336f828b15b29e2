#!/usr/bin/env bash
# Who:       transformers 5.23.0 (torch 2.13.0), T5 whose decoder has more layers than its encoder.
# What:      generate() ends in an IndexError: the cache is made with as many layers as the encoder has
#            (`num_hidden_layers` is `num_layers`). Training, and generate(use_cache=False), are right.
# Expected:  tokens, as without a cache.
# Seen:      2 encoder and 2 decoder layers   cache: tokens       no cache: tokens
#            2 encoder and 3 decoder layers   cache: IndexError   no cache: tokens
# Way out:   generate(use_cache=False).
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
from transformers import T5Config, T5ForConditionalGeneration


def told(decoder_layers: int, use_cache: bool) -> str:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=2, num_decoder_layers=decoder_layers)).eval()
    try:
        model.generate(torch.arange(1, 8)[None], max_new_tokens=3, use_cache=use_cache)
    except IndexError:
        return "IndexError"
    return "tokens"


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")))
seen = []
for layers in (2, 3):
    both = [told(layers, use_cache) for use_cache in (True, False)]
    print(f"2 encoder and {layers} decoder layers   cache: {both[0]:<12} no cache: {both[1]}")
    seen.append(both)
sys.exit(seen != [["tokens", "tokens"], ["IndexError", "tokens"]])
PYTHON
"$folder/env/bin/python" "$folder/run.py"
