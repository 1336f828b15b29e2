#!/usr/bin/env bash
# Who:       torch.nn of torch 2.13.0.
# What:      nn.Module calls the forward pre-hooks that it had when the call began, and asks for each whether it wants
#            keywords when it comes to it.  A hook that was registered with with_kwargs=True and is taken off in between, by
#            another hook or by another thread that serves the same model, is called without them.
# Expected:  it is called as it was registered, or not at all.
# Seen:      TypeError: a hook of (module, args, kwargs) misses its argument 'kwargs'.  One with a default for it goes on
#            without the keywords, and cannot tell that from a call that has none.
# Way out:   take None as the default, and do nothing then.
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

told = []
layer = nn.Linear(2, 2)


def with_keywords(module, args, kwargs):
    told.append(kwargs)


first = layer.register_forward_pre_hook(lambda module, args: second.remove())
second = layer.register_forward_pre_hook(with_keywords, with_kwargs=True)
print("torch", torch.__version__)
try:
    layer(torch.ones(1, 2))
except TypeError as error:
    print("TypeError:", error)
    print("as described: a hook that was taken off during the call was called without its keywords")
else:
    sys.exit("changed: a hook that was taken off during the call is called with its keywords, or not at all")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
