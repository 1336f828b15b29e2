#!/usr/bin/env bash
# Who:       peft 0.21.2 (transformers 5.23.0, torch 2.13.0).
# What:      generate(use_cache=False) with an aLoRA adapter (alora_invocation_tokens). Where the adapter begins to act is
#            counted from the end of the prompt and used from the end of every longer call: with each new token the start
#            moves one token on, behind the invocation and into what was generated. With a cache it stays.
# Expected:  the logits of both ways are equal up to rounding, as they are with plain LoRA.
# Seen:      step    0  1  2  3  4  5
#            LoRA    =  =  =  =  =  =
#            aLoRA   =  x  x  x  x  x
# Way out:   use_cache=True, which is the default.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import copy
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
)
base = transformers.LlamaForCausalLM(config).eval()
INVOCATION, STEPS = [7, 5, 9], 6
ids = torch.randint(10, 60, (1, 12))
ids[0, 3:6] = torch.tensor(INVOCATION)


def agreement(**options):
    """Return for each new token whether the logits with a cache and without one are equal up to rounding."""
    torch.manual_seed(1)
    modules = ["q_proj", "v_proj", "o_proj", "down_proj"]
    lora = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    settings = dict(max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with_cache = model.generate(input_ids=ids, **settings)
    without = model.generate(input_ids=ids, use_cache=False, **settings)
    pairs = zip(with_cache.logits, without.logits)
    return ["=" if (one - other).abs().max() < 1e-4 * one.abs().max() else "x" for one, other in pairs]


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
plain, invoked = agreement(), agreement(alora_invocation_tokens=INVOCATION)
print("step   ", *(f"{step} " for step in range(STEPS)))
print("LoRA   ", *(f"{mark} " for mark in plain))
print("aLoRA  ", *(f"{mark} " for mark in invoked))
sys.exit((plain, invoked) != (["="] * STEPS, ["=", *["x"] * (STEPS - 1)]))
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
