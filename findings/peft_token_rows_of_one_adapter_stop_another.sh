#!/usr/bin/env bash
# Who:       peft 0.21.2 (torch 2.13.0).
# What:      a model has two adapters, and one of them trainable_token_indices. PEFT asks the other one for token rows
#            too, when it is saved and when it is loaded, and fails: it can be neither saved nor loaded beside the first.
# Expected:  the other adapter is saved without rows, as it has none.
# Seen:      KeyError 'token_adapter.trainable_tokens_delta.plain' in get_peft_model_state_dict and save_pretrained
# Way out:   load each adapter onto a base of its own; or give every adapter rows.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import sys

import peft
import torch
from torch import nn

print("torch", torch.__version__, "peft", peft.__version__)
base = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["1"], trainable_token_indices={"0": [2]}), "rows")
model.add_adapter("plain", peft.LoraConfig(target_modules=["1"]))
assert peft.get_peft_model_state_dict(model, adapter_name="rows"), "the adapter with rows is saved"
try:
    peft.get_peft_model_state_dict(model, adapter_name="plain")
except KeyError as error:
    print(f"as described: KeyError {error}")
else:
    sys.exit("changed: an adapter without token rows is saved beside one that has some")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
