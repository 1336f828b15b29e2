"""`lora-fx inspect`: what is in an adapter's directory, and whether it fits a model."""

from __future__ import annotations

import json

import pytest
import torch

import lora_fx
from tests.cli.test_cli import imported_by
from tests.support.clitools import SMALL, run, small


@pytest.fixture
def adapter(tmp_path):
    model, inputs = small()
    rules = {"rules": [{"name": "qv", "match": {"name": "layers.*.{q,v}_proj"}, "lora": {"r": 2, "alpha": 4}}]}
    lora_fx.save(lora_fx.apply(model, rules, inputs), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect_tells_what_is_in_an_adapter_without_torch(adapter):
    assert not imported_by("inspect", str(adapter)) & {"torch", "numpy", "safetensors"}
    lines = run("inspect", adapter).stdout.splitlines()
    assert lines[1].split()[:4] == ["written", "by", "lora_fx", lora_version()]
    assert "  layers.{0..2}.q_proj  ×3  16 → 16  r=2 scaling=2  F32  qv" in lines
    assert lines[-1].startswith("6 sites, 384 parameters, ")
    document = json.loads(run("inspect", adapter, "--format", "json").stdout)
    assert (document["base"], document["noted"], document["parameters"]) == ("Small", 6, 384)


def lora_version() -> str:
    from importlib.metadata import version

    return version("lora-fx").removesuffix(",") + ","


def test_inspect_says_whether_an_adapter_fits_a_model(adapter):
    fits = run("inspect", adapter, SMALL)
    assert (fits.exit_code, fits.stdout.splitlines()[-1].startswith("fits Small: 6 sites")) == (0, True)
    other = run("inspect", adapter, "tests.support.textbook:gpt2_classifier")
    assert (other.exit_code, other.stderr) == (1, "")
    assert "\ndoes not fit GPT: 6 differences\n" in other.stdout
    assert "layers.0.q_proj  file 16 → 16  model has no such linear" in other.stdout


def test_inspect_as_json_has_the_verdict_in_it(adapter):
    plain = json.loads(run("inspect", adapter, "--format", "json").stdout)
    assert "fits" not in plain
    fits = run("inspect", adapter, SMALL, "--format", "json")
    assert (fits.exit_code, fits.stderr) == (0, "")
    verdict = {"fits": True, "model": "Small", "sites_in_model": 6, "base_values_compared": 0, "reasons": []}
    assert json.loads(fits.stdout) == plain | verdict
    other = run("inspect", adapter, "tests.support.textbook:gpt2_classifier", "--format", "json")
    assert other.exit_code == 1
    document = json.loads(other.stdout)
    assert (document["fits"], document["model"], document["sites_in_model"]) == (False, "GPT", 0)
    missing = {"name": "layers.0.q_proj", "in_file": "16 → 16", "in_model": "has no such linear"}
    assert missing in document["reasons"]
    assert len(document["reasons"]) == 6


def test_verdict_goes_where_the_contents_go(adapter, tmp_path):
    done = run("inspect", adapter, SMALL, "-o", tmp_path / "told.txt")
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "told.txt").read_text(encoding="utf-8").splitlines()[-1].startswith("fits Small: 6 sites")


def test_inspect_tells_whether_values_of_the_base_were_compared(tmp_path):
    (tmp_path / "models.py").write_text(
        "import torch\nfrom tests.support.clitools import small\n"
        "def seeded(n):\n    torch.manual_seed(n)\n    return small()\n"
        "def base(): return seeded(0)\n"
        "def other(): return seeded(1)\n"
    )
    torch.manual_seed(0)
    model, inputs = small()
    lora_fx.save(lora_fx.apply(model, {"rules": [{"match": {"name": "**.q_proj"}}]}, inputs), tmp_path / "adapter")
    base, other = (f"{tmp_path / 'models.py'}:{name}" for name in ("base", "other"))
    without = run("inspect", tmp_path / "adapter", other).stdout.splitlines()[-1]
    assert (
        without
        == "fits Small: 3 sites; names and shapes are the same; values of the base were not compared (--weights does)"
    )
    same = run("inspect", tmp_path / "adapter", base, "--weights")
    assert (
        same.stdout.splitlines()[-1] == "fits Small: 3 sites; names, shapes and values of 3 base weights are the same"
    )
    differs = run("inspect", tmp_path / "adapter", other, "--weights")
    assert differs.exit_code == 1
    *_, verdict, first, _, _ = differs.stdout.splitlines()
    assert verdict == "does not fit Small: 3 differences"
    assert first.split("  ")[1:] == [
        "layers.0.q_proj.weight", "file trained on other values", "model is another base, or was changed since",
    ]  # fmt: skip


def test_values_cannot_be_compared_without_a_model(adapter):
    assert (run("inspect", adapter, "--weights").exit_code) == 2


def test_inspect_tells_of_sites_that_cannot_be_adapted(adapter, tmp_path):
    (tmp_path / "m.py").write_text(
        "import torch\nfrom tests.support.clitools import small\n"
        "def f():\n    model, x = small()\n"
        "    torch.nn.utils.parametrizations.weight_norm(model.layers[0].q_proj)\n    return model, x\n"
    )
    told = run("inspect", adapter, f"{tmp_path / 'm.py'}:f")
    assert told.exit_code == 1
    *_, verdict, reason = told.stdout.splitlines()
    assert verdict == "does not fit Small: 1 difference"
    assert reason.startswith("  layers.0.q_proj  cannot be adapted: its weight is computed by a parametrization")


def test_inspect_of_an_adapter_of_peft_names_its_version_and_patterns(tmp_path):
    import peft

    model, _ = small()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, use_rslora=True)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    shown = run("inspect", tmp_path).stdout
    assert f"PEFT {peft.__version__}" in shown
    assert "layers.{0..2}.v_proj  ×3  16 → 16  r=4 scaling=4" in shown
    assert "rank-stabilised scaling" in shown


@pytest.mark.parametrize("damage", ["cut", "gone", "config"])
def test_inspect_of_a_damaged_adapter_ends_with_2(adapter, damage):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    (weights.unlink if damage == "gone" else lambda: None)()
    (config.write_text("{") if damage == "config" else None)
    result = run("inspect", adapter)
    assert result.exit_code == 2
    assert "lora-fx help AdapterFileError" in result.stderr
