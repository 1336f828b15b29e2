#!/usr/bin/env bash
# Who:       torch.fx of torch 2.13.0.
# What:      a ModuleDict has the keys "\ufb01" (one character, the ligature of f and i) and "fi".  symbolic_trace puts the
#            right path into the graph's node, and writes it into the Python source that it compiles as an attribute,
#            self.layers.\ufb01.  Python reads identifiers in their NFKC form (PEP 3131), so the code calls self.layers.fi:
#            another module, without a word.  fx.Interpreter, which looks the path up, is right.  Letters with a
#            compatibility form do the same: superscripts, full-width letters, "\u212b" for Angstrom.
# Expected:  the traced module computes what the module computes.
# Seen:      traced: the other layer's result; fx.Interpreter on the same graph: the right one.
# Way out:   keys in NFKC form: unicodedata.normalize("NFKC", key).
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from torch import fx, nn

KEY = "\ufb01"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({KEY: nn.Linear(2, 2), "fi": nn.Linear(2, 2)})

    def forward(self, x):
        return self.layers[KEY](x) + 0 * self.layers["fi"](x)


torch.manual_seed(0)
model, x = Model(), torch.ones(1, 2)
traced = fx.symbolic_trace(model)
paths = [node.target for node in traced.graph.nodes if node.op == "call_module"]
right, other = model.layers[KEY](x), model.layers["fi"](x)
print("torch", torch.__version__, "paths in the graph", list(map(ascii, paths)))
print("traced is the other layer:", torch.equal(traced(x), other), "- interpreted is right:",
      torch.equal(fx.Interpreter(traced).run(x), right))
if not (torch.equal(model(x), right) and torch.equal(traced(x), other) and torch.equal(fx.Interpreter(traced).run(x), right)):
    sys.exit("changed: the traced module no longer calls the module of the name that Python makes of it")
print("as described: the traced module computes with another layer")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
