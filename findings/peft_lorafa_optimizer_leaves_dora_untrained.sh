#!/usr/bin/env bash
# Who:       peft 0.21.2 (torch 2.13.0).
# What:      peft.optimizers.create_lorafa_optimizer pairs A and B by the order of the parameters that have "lora" in
#            their names. With use_dora or lora_bias a layer has a third such parameter: with one layer the magnitude or
#            the bias has a gradient and is never changed, without a word; with two the pairs are of other parameters
#            and the first step fails.
# Expected:  the magnitude and the bias of B are trained as with any other optimizer, or refused when it is made.
# Seen:      1 layer   use_dora    unchanged, with a gradient: magnitude
#            1 layer   lora_bias   unchanged, with a gradient: bias
#            2 layers  use_dora    TypeError
#            2 layers  lora_bias   TypeError
# Way out:   LoRA-FA without either of them, or another optimizer with A frozen.
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
from peft.optimizers import create_lorafa_optimizer


def step(layers, **options):
    """Return what stays as it was though it has a gradient, or the error of the step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(layers)))
    config = peft.LoraConfig(r=2, target_modules=[str(number) for number in range(layers)], **options)
    adapted = peft.get_peft_model(model, config)
    optimizer = create_lorafa_optimizer(adapted, r=2, lora_alpha=8, lr=0.1)
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    adapted(torch.randn(3, 4)).square().sum().backward()
    try:
        optimizer.step()
    except TypeError:
        return "TypeError"
    kept = [n for n, p in adapted.named_parameters() if p.grad is not None and torch.equal(p, before[n])]
    kinds = ["magnitude" if "magnitude" in name else name.rpartition(".")[2] for name in kept]
    return "unchanged, with a gradient: " + ", ".join(kinds)


print("torch", torch.__version__, "peft", peft.__version__)
seen = {}
for layers in (1, 2):
    for option in ("use_dora", "lora_bias"):
        seen[layers, option] = step(layers, **{option: True})
        print(f"{layers} layer{'s' * (layers > 1):<3} {option:<11} {seen[layers, option]}")
expected = {
    (1, "use_dora"): "unchanged, with a gradient: magnitude",
    (1, "lora_bias"): "unchanged, with a gradient: bias",
    (2, "use_dora"): "TypeError",
    (2, "lora_bias"): "TypeError",
}
sys.exit(seen != expected)
PYTHON
"$folder/env/bin/python" "$folder/run.py"
