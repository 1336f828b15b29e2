#!/usr/bin/env bash
# Who:       bitsandbytes 0.50.2 (torch 2.13.0), on a CPU with AVX-512 for bfloat16.
# What:      The first call of a Linear4bit in eval mode without gradients packs its weight anew, in place, for a kernel that has
#            no gradient.  Training goes on through that kernel: an evaluation between two steps takes the gradients of all
#            that is below away, with nothing but a UserWarning of torch.  A layer whose out_features are no multiple of 32
#            raises an AssertionError in eval mode.
# Expected:  the same gradient of x before and after an evaluation.
# Seen:      before: a gradient; after: None.  On CPUs without avx512_bf16 this is not so (exit 1: "changed").
# Way out:   layer.support_avx512bf16_for_cpu = False before the first call.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
cat > "$folder/run.py" <<'PYTHON'
import sys
import warnings

import bitsandbytes
import torch

warnings.simplefilter("ignore")


def layer(out):
    torch.manual_seed(0)
    made = bitsandbytes.nn.Linear4bit(64, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    made.load_state_dict({"weight": torch.randn(out, 64)})
    return made.to("cpu")  # quantises


def gradient(made):
    x = torch.ones(3, 64, requires_grad=True)
    made.train()(x).square().sum().backward()
    return x.grad


print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
made = layer(32)
before = gradient(made)
with torch.no_grad():
    made.eval()(torch.ones(3, 64))
after = gradient(made)
print("gradient before", before is not None, "after an evaluation", after is not None)
try:
    with torch.no_grad():
        layer(24).eval()(torch.ones(3, 64))
    says = "nothing"
except AssertionError as error:
    says = str(error)
print("24 outputs in eval mode raise:", says)
if before is None or after is not None or says == "nothing":
    sys.exit("changed: an evaluation leaves gradients (or this CPU has no AVX-512 for bfloat16)")
print("as described: after an evaluation no gradient passes")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
