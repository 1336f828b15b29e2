#!/usr/bin/env bash
# Who:       torch 2.13.0.
# What:      the first call of torch.compile(module) puts functions of torch's own into nn.Module.__init__ and
#            nn.Module.__setstate__, for all modules of the process and for good; torch.compiler.reset() does not take
#            them back. Whoever asks whether a class has methods of its own by comparing them with what nn.Module had
#            when it was imported (to copy, pickle or make modules faster than in general) finds that every class has,
#            even those that have nothing to do with what was compiled.
# Expected:  nn.Linear.__setstate__ is what it was.
# Seen:      before  __init__ of torch.nn.modules.module         __setstate__ of torch.nn.modules.module
#            after   __init__ of torch._dynamo.mutation_guard    __setstate__ of torch._dynamo.mutation_guard
# Way out:   compare with nn.Module's methods as they are at that moment.
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

NAMES = ("__init__", "__setstate__")


def homes():
    return {name: getattr(nn.Module, name).__module__ for name in NAMES}


print("torch", torch.__version__)
at_import = {name: getattr(nn.Module, name) for name in NAMES}
before, untouched = homes(), nn.LayerNorm(2)
compiled = torch.compile(nn.Linear(2, 2), backend="eager")
compiled(torch.ones(1, 2))
torch.compiler.reset()
after = homes()
for when, seen in (("before", before), ("after", after)):
    print(f"{when:<6}", *(f"  {name} of {home}" for name, home in seen.items()))
changed = type(untouched).__setstate__ is not at_import["__setstate__"]
plain, own = {"torch.nn.modules.module"}, {"torch._dynamo.mutation_guard"}
sys.exit(not (set(before.values()) == plain and set(after.values()) == own and changed))
PYTHON
"$folder/env/bin/python" "$folder/run.py"
