#!/usr/bin/env bash
# Who:       peft 0.21.2 with transformers 5.23.0 (torch 2.13.0).
# What:      an adapter of Mixtral's experts from before transformers 5 (one expert at a time: w1, w2, w3) is converted
#            to the fused banks when it is loaded: w1 and w3 become one product of rank 2r, and alpha is doubled with it.
#            With use_rslora=True the scaling is alpha / sqrt(r), so the doubled one is 2 alpha / sqrt(2r): the deltas of
#            w1 and w3 are too strong by sqrt(2). There is no warning of that. Without rslora all is right.
# Expected:  W + alpha / sqrt(r) B A for every expert.
# Seen:      largest difference of the logits, relative to the largest, against deltas added by hand
#              without rslora                               about 1e-7
#              with rslora                                  0.26 (counted as seen above 0.1)
#              with rslora, w1 and w3 times sqrt(2) by hand about 1e-7
# Way out:   write alpha / sqrt(r) * r as lora_alpha and use_rslora false into the configuration.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import json
import pathlib
import sys

import peft
import torch
import transformers
from safetensors.torch import save_file

IDS = torch.tensor([[1, 5, 7, 9], [3, 4, 2, 8]])
R, ALPHA, EXPERTS, HIDDEN, INNER = 2, 4, 3, 16, 12
SHAPES = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=50, num_local_experts=EXPERTS)
    heads = dict(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def stem(expert, name):
    return f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"


def adapter(folder, rslora):
    """Write an adapter as PEFT did with transformers 4; return its tensors."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    for expert in range(EXPERTS):
        for name, (out, inner) in SHAPES.items():
            tensors[f"{stem(expert, name)}.lora_A.weight"] = torch.randn(R, inner, generator=generator) * 0.3
            tensors[f"{stem(expert, name)}.lora_B.weight"] = torch.randn(out, R, generator=generator) * 0.3
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", r=R, lora_alpha=ALPHA, use_rslora=rslora)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(SHAPES)}))
    return tensors


def by_hand(tensors, scaling, gates=1.0):
    """Return the base with scaling * B A added to every expert; w1 and w3 times `gates`."""
    model = base()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(EXPERTS):
            w1, w2, w3 = (
                scaling * tensors[f"{stem(expert, name)}.lora_B.weight"] @ tensors[f"{stem(expert, name)}.lora_A.weight"]
                for name in SHAPES
            )
            experts.gate_up_proj[expert] += gates * torch.cat([w1, w3])
            experts.down_proj[expert] += w2
    return model


@torch.no_grad()
def difference(a, b):
    a, b = a(input_ids=IDS).logits, b(input_ids=IDS).logits
    return float((a - b).abs().max() / b.abs().max())


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
home = pathlib.Path(sys.argv[1])
plain, stable = adapter(home / "plain", False), adapter(home / "stable", True)
without = peft.PeftModel.from_pretrained(base(), home / "plain").eval()
with_it = peft.PeftModel.from_pretrained(base(), home / "stable").eval()
right = difference(without, by_hand(plain, ALPHA / R))
wrong = difference(with_it, by_hand(stable, ALPHA / R**0.5))
root_2 = difference(with_it, by_hand(stable, ALPHA / R**0.5, gates=2**0.5))
print(f"without rslora {right:.1e}, with rslora {wrong:.1e}, with w1 and w3 times sqrt(2) {root_2:.1e}")
if not (right < 1e-5 and wrong > 0.1 and root_2 < 1e-5):
    sys.exit("changed: converted experts with rslora are no longer too strong by sqrt(2)")
print("as described: the deltas of w1 and w3 are too strong by sqrt(2)")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
