#!/usr/bin/env bash
# Who:       torch 2.13.0, on the processor.
# What:      a step of AdamW(fused=True) changes parameters in place without counting it in their `_version`. Autograd
#            finds by that count whether what it saved for a backward pass is still what it was: a backward pass that
#            comes after such a step is refused with the other implementations (foreach, for loop) and runs with the
#            fused one, on the new values. Its gradient belongs to no forward pass that ever ran.
# Expected:  the error of the other two: "one of the variables needed for gradient computation has been modified".
# Seen:      for loop   _version +1   RuntimeError
#            foreach    _version +1   RuntimeError
#            fused      _version +0   a gradient of the new weight, no error
# Way out:   whatever is to notice a change of weights compares values, or is told of steps by
#            torch.optim.Optimizer.register_step_post_hook; not `_version` alone.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch

WAYS = {
    "for loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"fused": True},
}


def late_backward(choice):
    """Return what a step adds to the version, and what a backward pass after it gives: w² has the gradient 2w."""
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0, **choice)
    weight.grad = torch.ones(1)
    loss = weight.square().sum()
    before = weight._version
    optimizer.step()
    added = weight._version - before
    optimizer.zero_grad()
    try:
        loss.backward()
    except RuntimeError as error:
        return added, "modified by an inplace operation" in str(error) and "RuntimeError"
    return added, weight.grad.item()


print("torch", torch.__version__)
seen = {name: late_backward(choice) for name, choice in WAYS.items()}
for name, (added, result) in seen.items():
    print(f"{name:<10} _version +{added}   {result}")
sys.exit(seen != {"for loop": (1, "RuntimeError"), "foreach": (1, "RuntimeError"), "fused": (0, 5.0)})
PYTHON
"$folder/env/bin/python" "$folder/run.py"
