#!/usr/bin/env bash
# Who:       torch 2.9.1 on Python 3.13.0 (torch.compile, any backend: "eager" here).
# What:      a module's forward asks one of its own attributes which way to go.  After the first call the attribute is
#            set to another value, by m.flag = ..., and the compiled module goes the old way: no recompilation, no
#            warning.  It checks attributes by the versions of the dictionaries that hold them
#            (torch._dynamo.config.use_recursive_dict_tags_for_guards, on in this release; off in 2.13).  With that
#            setting off before the first call, all is right.
# Expected:  the compiled module goes the way that the attribute says, as the module itself does.
# Seen:      module itself: new way; compiled: old way; compiled with the setting off: new way.
# Way out:   the setting off, a newer torch, or torch.compiler.set_stance("force_eager") around such calls.
# Exit:      0 while it is so, 1 when it has changed.
# PYTHON names the interpreter: it must be Python 3.13.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.13}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.9.1 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
from torch import nn

X = torch.ones(1, 2)


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.flag = nn.Linear(2, 2), "on"

    def forward(self, x):
        return self.linear(x) + 100 if self.flag == "on" else self.linear(x)


def way_after_switching(compiles):
    """Return which way the module goes once its attribute has been set to "off"."""
    torch._dynamo.reset()
    module = Switched()
    called = torch.compile(module, backend="eager") if compiles else module
    assert called(X).max() > 50
    module.flag = "off"
    return "old" if called(X).max() > 50 else "new"


print("Python", sys.version.split()[0], "torch", torch.__version__)
itself, compiled = way_after_switching(False), way_after_switching(True)
torch._dynamo.config.use_recursive_dict_tags_for_guards = False
without_tags = way_after_switching(True)
print(f"module itself: {itself} way; compiled: {compiled} way; compiled with the setting off: {without_tags} way")
if (itself, compiled, without_tags) != ("new", "old", "new"):
    sys.exit("changed: compiled code sees the attribute now, or the setting no longer decides it")
print("as described: compiled code misses the changed attribute")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
