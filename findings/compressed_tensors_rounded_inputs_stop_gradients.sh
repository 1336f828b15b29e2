#!/usr/bin/env bash
# Who:       compressed-tensors 0.20.1 (peft 0.21.2, torch 2.13.0), on the processor.
# What:      a linear layer whose scheme rounds its inputs (W8A8: input_activations) rounds them under torch.no_grad, and
#            gives its input no gradient. An adapter of PEFT's at the layer below is then trained through the adapter of
#            the layer above alone: at the first step, while that is zero, its gradient is exactly zero. There is no
#            error and no warning. Where weights alone are rounded (W8A16) all is right.
# Expected:  a gradient in both, as transformers' page "compressed-tensors" says: fine-tuning with PEFT, "fp8, int4, int8
#            weight and activation precisions".
# Seen:      length of the gradient of B of the lower layer, at the first step
#              W8A16   above 1
#              W8A8    0
# Way out:   train beside weights that are rounded alone, or load the model with dequantize=True.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.1 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

import peft
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from torch import nn

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel"}
INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def lengths(inputs):
    """Return the lengths of the gradients of B, of the lower and of the upper layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    scheme = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": inputs}
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}))
    for layer in model:  # those of its weight, as a calibration finds them
        layer.weight_scale.data = layer.weight.data.abs().amax(1, keepdim=True) / 127
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    tuned(torch.randn(16, 32)).square().sum().backward()
    named = dict(tuned.named_parameters())
    return [float(named[f"base_model.model.{layer}.lora_B.default.weight"].grad.norm()) for layer in (0, 1)]


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "compressed-tensors", "peft")))
weights, both = lengths(None), lengths(INPUTS)
print("              lower layer  upper layer")
for name, (lower, upper) in {"W8A16": weights, "W8A8": both}.items():
    print(f"{name:<13} {lower:<12.4f} {upper:.4f}")
if not (min(weights) > 1 and both[0] == 0 and both[1] > 1):
    sys.exit("changed: rounded inputs no longer keep the gradient from what is below")
print("as described: no gradient passes a layer that rounds its inputs")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
