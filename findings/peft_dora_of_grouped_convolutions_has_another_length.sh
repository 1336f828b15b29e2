#!/usr/bin/env bash
# Who:       peft 0.21.2 (torch 2.13.0).
# What:      DoRA on a convolution in groups divides by the length of another matrix than the one it computes with: the norm
#            is of B, seen as [out / g, r], times A, seen as [out, in / g].  There is no error; merging is refused, so
#            nothing shows it.
# Expected:  each filter that the layer computes with has the length m, as it has without groups.
# Seen:      largest difference of a filter's length and m, relative to m
#              1 group    0 to 1e-6
#              2 groups   0.8 (counted as seen above 0.05)
# Way out:   leave such layers out of `target_modules`, or train them without DoRA.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
from torch import nn

warnings.simplefilter("ignore")


@torch.no_grad()
def difference(groups):
    """Return how far the lengths of the filters of a trained layer are from m."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 8, 1, groups=groups, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after training
            parameter.normal_()
    filters = model(torch.eye(8)[:, :, None, None])[:, :, 0, 0].t()  # what the kernel of 1 makes of each channel
    lengths = model.base_model.model[0].lora_magnitude_vector["default"].weight.flatten()
    return float(((filters.norm(dim=1) - lengths) / lengths).abs().max())


print("torch", torch.__version__, "peft", peft.__version__)
one, two = (difference(groups) for groups in (1, 2))
print(f"1 group {one:.1e}, 2 groups {two:.1e}")
if not (one < 1e-4 and two > 0.05):
    sys.exit("changed: the filters of a grouped convolution have the lengths m, or others have not")
print("as described: in groups the filters have other lengths than m")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
