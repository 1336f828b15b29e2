#!/usr/bin/env bash
# Who:       peft 0.21.2 (torch 2.13.0).
# What:      trainable_token_indices put a layer around an embedding, or a head, that computes F.embedding or F.linear by
#            itself. The bias of the head is left out, and so is whatever forward a subclass of nn.Embedding has (offsets of
#            positions, normalised rows; a factor called embed_scale is put back). There is no warning.
# Expected:  a fresh adapter changes nothing.
# Seen:      largest difference of the outputs by a fresh adapter
#            head with a bias of 1           1.000
#            subclass that adds 1, a linear  0.996 (counted as seen above 0.1)
#            plain head, plain embedding     0
# Way out:   none in PEFT: leave the rows of such modules out.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 peft==0.21.2
cat > "$folder/run.py" <<'PYTHON'
import copy
import sys

import peft
import torch
from torch import nn


class Raised(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + 1


def difference(words, head, rows):
    """Return by how much a fresh adapter changes the outputs, at most."""
    torch.manual_seed(0)
    base = nn.Sequential(words, nn.Linear(4, 4), head)
    ids = torch.arange(9)
    expected = base(ids)
    config = peft.LoraConfig(target_modules=["1"], trainable_token_indices={rows: [2]})
    return float((peft.get_peft_model(copy.deepcopy(base), config)(ids) - expected).abs().max())


print("torch", torch.__version__, "peft", peft.__version__)
biased, plain = nn.Linear(4, 9), nn.Linear(4, 9, bias=False)
nn.init.ones_(biased.bias)
identity = nn.Identity()
seen = [
    difference(nn.Embedding(9, 4), biased, "2"),
    difference(Raised(9, 4), identity, "0"),
    difference(nn.Embedding(9, 4), plain, "2"),
    difference(nn.Embedding(9, 4), plain, "0"),
]
print("head with a bias {:.3f}, subclass {:.3f}, plain head {:.1e}, plain embedding {:.1e}".format(*seen))
if not (abs(seen[0] - 1) < 1e-5 and seen[1] > 0.1 and max(seen[2:]) < 1e-6):
    sys.exit("changed: rows no longer leave out a bias and a forward")
print("as described: the bias of the head and the forward of the embedding are left out")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
