#!/usr/bin/env bash
# Who:       peft 0.21.2 (torch 2.13.0, transformers 5.23.0).
# What:      with trainable_token_indices of the head of a model whose head is tied to its input embeddings, the adapted
#            model changes rows of the head alone. merge_and_unload writes the rows into the one weight of both, so that
#            the merged model embeds these tokens otherwise. There is no warning.
# Expected:  the merged model computes what the adapted model computes.
# Seen:      largest difference of the logits, rows moved by about 0.3
#            head tied      5.5 (counted as seen above 1)
#            head not tied  0
# Way out:   none in PEFT: untie the weights before.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import copy
import sys

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM


def difference(tied):
    """Return by how much the merged model's logits differ from the adapted model's, at most."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=60, tie_word_embeddings=tied)).eval()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [9, 3]})
    model = peft.get_peft_model(base, config).eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 3, 12]])
    with torch.no_grad():
        for name, rows in model.named_parameters():
            if "trainable_tokens_delta" in name:
                rows.add_(0.3 * torch.randn_like(rows))
        expected = model(input_ids=ids).logits
        return float((copy.deepcopy(model).merge_and_unload()(input_ids=ids).logits - expected).abs().max())


print("torch", torch.__version__, "transformers", transformers.__version__, "peft", peft.__version__)
tied, apart = difference(True), difference(False)
print(f"tied {tied:.2f}, not tied {apart:.1e}")
if not (tied > 1 and apart < 1e-5):
    sys.exit("changed: rows of a tied head no longer change the input embeddings in a merge")
print("as described: the merged model has the rows of the head in its input embeddings too")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
