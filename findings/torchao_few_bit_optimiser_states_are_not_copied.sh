#!/usr/bin/env bash
# Who:       torchao 0.18.0 (torch 2.13.0), on the processor.
# What:      after a step the states of AdamW8bit, AdamW4bit and AdamWFp8 (of parameters of 4,096 numbers and more)
#            cannot be copied by copy.deepcopy: their tensors have no aten.clone. torch.optim's AdamW can be copied.
# Expected:  copy.deepcopy(optimizer.state_dict()) returns a copy, as early stopping and snapshots in memory ask for it.
# Seen:      AdamW       copied
#            AdamW8bit   NotImplementedError: aten.clone
#            AdamW4bit   NotImplementedError: aten.clone
#            AdamWFp8    NotImplementedError: aten.clone
# Way out:   torch.save into a file or io.BytesIO, and torch.load.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import copy
import importlib.metadata
import io
import sys

import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8


def copied(kind):
    """Return what comes of a copy of an optimizer's state after a step, and whether torch.save keeps it."""
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = kind([weight], lr=1e-2)
    weight.square().sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    try:
        copy.deepcopy(optimizer.state_dict())
    except NotImplementedError as error:
        return "NotImplementedError: " + ("aten.clone" if "aten.clone" in str(error) else str(error))
    return "copied"


print("torch", torch.__version__, "torchao", importlib.metadata.version("torchao"))
seen = {kind.__name__: copied(kind) for kind in (torch.optim.AdamW, AdamW8bit, AdamW4bit, AdamWFp8)}
for name, result in seen.items():
    print(f"{name:<11} {result}")
fails = "NotImplementedError: aten.clone"
sys.exit(seen != {"AdamW": "copied", "AdamW8bit": fails, "AdamW4bit": fails, "AdamWFp8": fails})
PYTHON
"$folder/env/bin/python" "$folder/run.py"
