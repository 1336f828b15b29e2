#!/usr/bin/env bash
# Who:       torch 2.13.0, torch.distributed.tensor.parallel, one process with gloo.
# What:      parallelize_module with SequenceParallel() makes new parameters of a module, all of which require a gradient:
#            what was frozen is trained from then on. ColwiseParallel and RowwiseParallel keep the flag.
# Expected:  a frozen parameter stays frozen, as with the other two styles.
# Seen:      ColwiseParallel    weight False   bias False
#            RowwiseParallel    weight False   bias False
#            SequenceParallel   weight True    bias True
# Way out:   freeze after parallelize_module, and give the optimizer what is to be trained, not model.parameters().
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
print("torch", torch.__version__)
seen = {}
for style in (ColwiseParallel(), RowwiseParallel(), SequenceParallel()):
    module = torch.nn.LayerNorm(4) if isinstance(style, SequenceParallel) else torch.nn.Linear(4, 4)
    module.requires_grad_(False)
    parallelize_module(module, mesh, style)
    seen[type(style).__name__] = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
for name, flags in seen.items():
    print(f"{name:<18}", *(f"{parameter} {flag!s:<7}" for parameter, flag in flags.items()))
dist.destroy_process_group()
frozen, trained = {"weight": False, "bias": False}, {"weight": True, "bias": True}
sys.exit(seen != {"ColwiseParallel": frozen, "RowwiseParallel": frozen, "SequenceParallel": trained})
PYTHON
"$folder/env/bin/python" "$folder/run.py" "$folder"
