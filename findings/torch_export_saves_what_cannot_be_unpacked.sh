#!/usr/bin/env bash
# Who:       torch.export of torch 2.13.0.
# What:      a ModuleDict has a key that is a word of Python: "class", "in", "from", "global".  torch.export.export, save
#            and load all work, and nothing warns.  What is left of the model is that file; program.module(), which every
#            client calls, writes the paths of the weights into source as attributes (self.layers.class.weight) and
#            ends in a SyntaxError.
# Expected:  an error when the model is exported, or a module.
# Seen:      exported, saved, loaded; program.module(): SyntaxError.  With the key "klass" it is a module.
# Way out:   rename the key before the export.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key, self.layers = key, nn.ModuleDict({key: nn.Linear(2, 2)})

    def forward(self, x):
        return self.layers[self.key](x)


def way_of(key):
    """Return what becomes of a model with this key after it has been exported, saved and loaded."""
    model, x, path = Model(key), torch.ones(1, 2), f"{sys.argv[1]}/model.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    program = torch.export.load(path)
    try:
        return "a module" if torch.equal(program.module()(x), model(x)) else "a module that computes something else"
    except SyntaxError:
        return "SyntaxError"


print("torch", torch.__version__)
ways = {key: way_of(key) for key in ("klass", "class", "in", "from", "global")}
print(ways)
if ways != {"klass": "a module"} | dict.fromkeys(("class", "in", "from", "global"), "SyntaxError"):
    sys.exit("changed: such programs are refused when they are exported, or can be unpacked")
print("as described: the program was saved and loaded, and cannot be unpacked")
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
