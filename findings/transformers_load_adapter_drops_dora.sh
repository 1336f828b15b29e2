#!/usr/bin/env bash
# Who:       transformers 5.23.0 (with peft 0.21.2, torch 2.13.0).
# What:      model.load_adapter(folder) of a DoRA adapter that PEFT itself wrote leaves out its trained lengths
#            (lora_magnitude_vector): they are listed as UNEXPECTED and MISSING in a report, there is no error, and the
#            model computes something else than PeftModel.from_pretrained of the same folder.
# Expected:  the same output from both, as for an adapter without DoRA.
# Seen:      largest difference of the logits, PeftModel against load_adapter
#              plain LoRA   0 to 1e-6
#              DoRA         1.1 (counted as seen above 0.1)
# Way out:   PeftModel.from_pretrained(model, folder), or merge before.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import sys

import peft
import torch
import transformers

IDS = torch.tensor([[1, 5, 7, 9, 3]])


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.3)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def difference(dora, folder):
    """Write a trained adapter with PEFT; return how far the two ways to load it are from each other."""
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], use_dora=dora, init_lora_weights=False)
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():  # as after training: the lengths are no longer those of the base
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    by_peft = logits(peft.PeftModel.from_pretrained(base(), folder).eval())
    assert torch.allclose(by_peft, logits(model.eval()), atol=1e-5), "PEFT reads what it wrote"
    plain = base()
    plain.load_adapter(folder)
    return float((logits(plain) - by_peft).abs().max())


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
lora, dora = (difference(which, f"{sys.argv[1]}/{which}") for which in (False, True))
print(f"plain LoRA {lora:.1e}, DoRA {dora:.1e}")
if not (lora < 1e-4 and dora > 0.1):
    sys.exit("changed: load_adapter and PeftModel are no longer apart by the lengths of DoRA alone")
print("as described: load_adapter leaves out the lengths of DoRA")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
