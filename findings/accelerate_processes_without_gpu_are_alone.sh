#!/usr/bin/env bash
# Who:       accelerate 1.15.0 (torch 2.13.0), torchrun, a machine without a GPU.
# What:      in a script that torchrun starts twice, Accelerator() believes in each of the processes that it is the only
#            one, without a word: num_processes is 1, each is the main process, gradients are not averaged, data are not
#            divided, and files are written twice. With Accelerator(cpu=True) they find each other.
# Expected:  num_processes 2 (or an error), as RANK and WORLD_SIZE are set.
# Seen:      Accelerator()           2 processes, each of 1
#            Accelerator(cpu=True)   2 processes, each of 2
# Way out:   Accelerator(cpu=not torch.accelerator.is_available()).
# Exit:      0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/run.py" <<'PYTHON'
import os
import pathlib
import sys

import accelerate

options = {"cpu": True} if sys.argv[2] == "cpu" else {}
accelerator = accelerate.Accelerator(**options)
pathlib.Path(sys.argv[1], f"{sys.argv[2]}.{os.environ['RANK']}").write_text(str(accelerator.num_processes))
accelerator.end_training()
PYTHON
cat > "$folder/told.py" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

print(*(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "accelerate")))
seen = {}
for way in ("plain", "cpu"):
    seen[way] = [path.read_text() for path in sorted(pathlib.Path(sys.argv[1]).glob(f"{way}.*"))]
    name = {"plain": "Accelerator()", "cpu": "Accelerator(cpu=True)"}[way]
    print(f"{name:<23} {len(seen[way])} processes, each of", *set(seen[way]))
sys.exit(seen != {"plain": ["1", "1"], "cpu": ["2", "2"]})
PYTHON
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
for way in plain cpu; do
    "$folder/env/bin/torchrun" --nproc-per-node 2 --master-port 0 --rdzv-backend c10d --rdzv-endpoint localhost:0 \
        "$folder/run.py" "$folder" $way 2> "$folder/errors" || { tail -n 20 "$folder/errors"; exit 1; }
done
"$folder/env/bin/python" "$folder/told.py" "$folder"
