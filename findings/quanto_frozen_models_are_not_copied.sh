#!/usr/bin/env bash
# Who:       optimum-quanto 0.2.7 (torch 2.13.0), on the processor.
# What:      a model whose weights are quantised and frozen cannot be deep-copied: copy.deepcopy ends in a RuntimeError about
#            a tensor that has no storage of its own, as every tool does that copies a model first (an EMA of it, a
#            reference for a trainer, model surgery). Under torch.autocast on the processor its linear layers take no
#            input in bfloat16: the bias is cast, the weight is not.
# Expected:  a copy, and a product, as of the plain model.
# Seen:      deepcopy: RuntimeError; autocast on an input in bfloat16: RuntimeError, on one in float32 none.
# Way out:   quantise a copy of the plain model with the same settings and load the state dict; leave inputs in float32
#            under autocast.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 optimum-quanto==0.2.7
cat > "$folder/run.py" <<'PYTHON'
import copy
import importlib.metadata
import sys

import torch
from optimum.quanto import freeze, qint8, quantize
from torch import nn


def told(run):
    try:
        run()
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0][:90]}"
    return "fine"


def cast(model, x):
    with torch.autocast("cpu"):
        return model(x)


plain = nn.Sequential(nn.Linear(4, 4))
quantised = copy.deepcopy(plain)
quantize(quantised, weights=qint8)
freeze(quantised)
x = torch.randn(3, 4)
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "optimum-quanto")))
seen = {}
for name, model in (("plain", plain), ("quanto", quantised)):
    seen[name] = [told(lambda: copy.deepcopy(model)), told(lambda: cast(model, x)), told(lambda: cast(model, x.bfloat16()))]
    for what, found in zip(("deepcopy", "autocast, float32", "autocast, bfloat16"), seen[name], strict=True):
        print(f"{name:<7} {what:<19} {found}")
right = seen["plain"] == ["fine"] * 3 and seen["quanto"][1] == "fine"
if not (right and all(seen["quanto"][at].startswith("RuntimeError") for at in (0, 2))):
    sys.exit("changed: a frozen model is copied, or takes bfloat16 under autocast")
print("as described: a frozen model is not copied, and takes no bfloat16 under autocast")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
