#!/usr/bin/env bash
# Who:       torch 2.13.0, DTensor; copy.deepcopy of one, or of a model that holds one as a parameter or a gradient.
# What:      a DTensor whose local tensor is a view that begins behind the start of its storage (a slice, one part of a
#            `split`, as gradients of layers that one product serves are) is not copied; a view at the start is, and so
#            is a plain tensor of any kind.
# Expected:  a copy.
# Seen:      own memory             copied
#            view at the start      copied
#            view behind the start  RuntimeError: Attempted to call copy_() on an invalid python storage.
#            plain view             copied
# Way out:   clone the local tensor before it becomes a DTensor.
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

with tempfile.NamedTemporaryFile() as meeting:
    dist.init_process_group("gloo", init_method=f"file://{meeting.name}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    whole = torch.arange(8.0).reshape(4, 2)
    cases = {
        "own memory": DTensor.from_local(whole[2:].clone(), mesh, [Replicate()]),
        "view at the start": DTensor.from_local(whole[:2], mesh, [Replicate()]),
        "view behind the start": DTensor.from_local(whole[2:], mesh, [Replicate()]),
        "plain view": whole[2:],
    }
    print("torch", torch.__version__)
    seen = []
    for name, tensor in cases.items():
        try:
            copy.deepcopy(tensor)
            told = "copied"
        except RuntimeError as error:
            told = f"RuntimeError: {error}".splitlines()[0]
        print(f"{name:<22} {told}")
        seen.append(told.partition(":")[0])
    dist.destroy_process_group()
sys.exit(seen != ["copied", "copied", "RuntimeError", "copied"])
PYTHON
"$folder/env/bin/python" "$folder/run.py"
