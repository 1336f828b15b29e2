"""remerge is a wing that can be detached: everything else runs without its folder."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["lora_fx.remerging"] = None  # an import of it, or of anything in it, fails
import torch
from torch import nn
import lora_fx

folder = sys.argv[1]
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
x = torch.randn(3, 4)
rules = {"version": 1, "rules": [{"match": {"name": "0"}, "lora": {"r": 2, "init": "random"}}]}
tuned = lora_fx.apply(model, lora_fx.plan(model, rules, (x,)), (x,)).eval()
expected = tuned(x)
assert not torch.equal(expected, model(x))
lora_fx.save(tuned, f"{folder}/adapter")
assert torch.equal(lora_fx.load(model, f"{folder}/adapter", (x,)).eval()(x), expected)
torch.testing.assert_close(lora_fx.merge(tuned)(x), expected)
assert lora_fx.export(tuned, f"{folder}/merged", "merged", (x,)).path.is_dir()
assert not [name for name in sys.modules if name.startswith("lora_fx.remerging.")]
try:
    lora_fx.remerge(model)
except ImportError:
    print("all but remerge")
"""


def test_all_but_remerge_runs_without_the_folder_remerging(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "all but remerge"
