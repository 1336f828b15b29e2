#!/usr/bin/env bash
# Who:       compressed-tensors 0.20.1 (torch 2.13.0), on the processor.
# What:      a linear layer whose scheme rounds its inputs by token (W8A8 of INT8: strategy "token", dynamic) takes one
#            scale for each token of inputs [batch, tokens, features], and one scale for all of inputs [tokens, features],
#            as blocks hand on that flatten their tokens, those of experts among them. There what comes out for a token depends on
#            which others are there: one that is a hundred times as large takes nearly all of the bits of the rest.
# Expected:  a scale for each token, whatever the number of dimensions, as the strategy is called.
# Seen:      relative error of five tokens beside a large one, over plain float32
#              [1, 6, 32]   below 0.01
#              [6, 32]      above 0.3
#            and below 0.01 where each token is called alone.
# Way out:   input.unsqueeze(0) before such a layer, and squeeze(0) behind it.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.1
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 16))
plain = model[0].weight.detach().clone(), model[0].bias.detach().clone()
scheme = {
    "targets": ["Linear"],
    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
}
apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
model[0].weight_scale.data = plain[0].abs().amax(1, keepdim=True) / 127  # as a calibration finds them

tokens = torch.randn(6, 32)
tokens[5] *= 100
right = nn.functional.linear(tokens, *plain)[:5]


def error(result):
    return float((result[:5] - right).norm() / right.norm())


with torch.no_grad():
    seen = {
        "[1, 6, 32]": error(model(tokens.unsqueeze(0))[0]),
        "[6, 32]": error(model(tokens)),
        "each [1, 32]": error(torch.cat([model(token.unsqueeze(0)) for token in tokens])),
    }
print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "compressed-tensors")))
for shape, found in seen.items():
    print(f"{shape:<13} {found:.4f}")
deep, flat, alone = seen.values()
if not (deep < 0.01 and flat > 0.3 and alone < 0.01):
    sys.exit("changed: tokens of flat inputs have scales of their own")
print("as described: the scale by token is one for all tokens of flat inputs")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
