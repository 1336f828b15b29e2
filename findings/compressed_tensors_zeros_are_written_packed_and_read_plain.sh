#!/usr/bin/env bash
# Who:       compressed-tensors 0.20.1 with transformers 5.23.0 (torch 2.13.0).
# What:      a checkpoint of packed integers with zeros (W4A16 in groups, "symmetric": false) that both have written cannot
#            be loaded as codes. Zeros are packed along the rows when weights are compressed; when a model is made for the
#            checkpoint, on the meta device, they are not, so their sizes differ. Without zeros all is right.
# Expected:  it is loaded, as the same checkpoint without zeros is.
# Seen:      symmetric true                       loaded
#            symmetric false                      RuntimeError: sizes of weight_zero_point differ
#            symmetric false, dequantize=True     loaded, with the weights that were written
# Way out:   quantization_config=CompressedTensorsConfig(dequantize=True), or symmetric codes. Not ignore_mismatched_sizes=True:
#            the zeros are then made up, and the first call ends in a ValueError.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 compressed-tensors==0.20.1 transformers==5.23.0
cat > "$folder/run.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

SCALE, ZERO, LAYER = 0.01, 2, "model.layers.0.mlp.up_proj"


def written(folder, symmetric):
    """Write a small Llama with codes of 4 bits; return the weight that the codes of one layer stand for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32))
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for layer in model.modules():  # as a calibration finds them
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.fill_(SCALE)
            if not symmetric:
                layer.weight_zero_point.data.fill_(ZERO)
    zero = 0 if symmetric else ZERO
    codes = (model.get_submodule(LAYER).weight.detach() / SCALE).round() + zero
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return (codes.clamp(-8, 7) - zero) * SCALE


def loaded(folder, **options):
    """Return the model of a checkpoint, or the name of the error."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        return type(error).__name__


print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "compressed-tensors", "transformers")))
folder = sys.argv[1]
written(f"{folder}/plain", symmetric=True)
weight = written(f"{folder}/zeros", symmetric=False)
whole = transformers.CompressedTensorsConfig(dequantize=True)
plain, zeros = loaded(f"{folder}/plain"), loaded(f"{folder}/zeros")
wide = loaded(f"{folder}/zeros", quantization_config=whole)
for name, result in {"true": plain, "false": zeros, "false, dequantize=True": wide}.items():
    print(f"symmetric {name:<23} {result if isinstance(result, str) else 'loaded'}")
if isinstance(plain, str) or isinstance(wide, str) or zeros != "RuntimeError":
    sys.exit("changed: what is loaded is not what it was")
if not torch.allclose(wide.get_submodule(LAYER).weight, weight):
    sys.exit("changed: dequantize=True gives other weights than were written")
print("as described: codes with zeros are written and cannot be loaded")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
