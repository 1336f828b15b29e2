#!/usr/bin/env bash
# Who:       torch 2.13.0, on the processor.
# What:      torch.save and deepcopy take tensors of every dtype; pickle.dumps ends with "type object
#            'torch.storage.UntypedStorage' has no attribute 'dtype'" for those of float8 (four kinds) and of uint16, uint32
#            and uint64: dtypes that have no typed storage. So a model whose weights are in float8, as checkpoints of
#            today come, can be saved and copied and not be handed to a process that is spawned.
# Expected:  the tensor, as with int8 and bfloat16, or an error that names the dtype.
# Seen:      pickled and read again
#              bfloat16, float16, int8, uint8                                                yes
#              float8_e4m3fn, float8_e5m2, float8_e4m3fnuz, float8_e8m0fnu, uint16, 32, 64   AttributeError
# Way out:   torch.save into an io.BytesIO, and its bytes; or a view of another dtype of the same size.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import copy
import io
import pickle
import sys

import torch

TAKEN = ("bfloat16", "float16", "int8", "uint8")
LEFT = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu", "uint16", "uint32", "uint64")


def pickled(tensor):
    return pickle.loads(pickle.dumps(tensor))


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def told(way, tensor):
    """Return "yes" where a tensor comes back with its bits, else the error's name."""
    try:
        back = way(tensor)
    except AttributeError as error:
        return f"AttributeError ({error})"
    return "yes" if back.dtype == tensor.dtype and torch.equal(back.view(torch.uint8), tensor.view(torch.uint8)) else "no"


print("torch", torch.__version__)
seen = {}
for name in (*TAKEN, *LEFT):
    tensor = torch.arange(16, dtype=torch.uint8).view(getattr(torch, name))
    seen[name] = [told(way, tensor) for way in (saved, copy.deepcopy, pickled)]
    print(f"{name:<16} torch.save {seen[name][0]:<4} deepcopy {seen[name][1]:<4} pickle {seen[name][2]}")
right = all(seen[name] == ["yes"] * 3 for name in TAKEN) and all(seen[name][:2] == ["yes"] * 2 for name in LEFT)
if not (right and all(seen[name][2].startswith("AttributeError") for name in LEFT)):
    sys.exit("changed: pickle takes these dtypes, or another way does not")
print("as described: what torch.save takes, pickle does not")
PYTHON
"$folder/env/bin/python" "$folder/run.py" 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
