"""Exports of a model with several adapters: one by name, each, or what is in use; never one in place of another."""

from __future__ import annotations

import pytest
import torch

import lora_fx
from lora_fx.errors import ExportError
from tests.support.twoadapters import BOTH, DORA, WIDE, alone, given, two


@pytest.mark.parametrize("target", ["gguf", "kohya", "mlx", "diffusers", "vllm", "pt2", "executorch"])
def test_several_at_one_weight_are_refused_by_name(target, tmp_path):
    with pytest.raises(ExportError, match=r"blocks\.0\.k") as caught:
        lora_fx.export(two(), tmp_path / "out", target, (given(),))
    assert ("blocks.0.k", "a, b") in caught.value.facts
    assert "adapter=" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_named_adapter_is_written_as_if_it_were_alone(tmp_path):
    lora_fx.export(two(), tmp_path / "b.safetensors", "kohya", adapter="b")
    lora_fx.export(alone(WIDE, "b"), tmp_path / "alone.safetensors", "kohya")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_merged_folds_what_is_in_use_or_the_named_one(tmp_path):
    from safetensors.torch import load_file

    tuned = two()
    lora_fx.use(tuned, {"a": 0.5, "b": 1.0})
    lora_fx.export(tuned, tmp_path / "used.safetensors", "merged")
    lora_fx.export(tuned, tmp_path / "b.safetensors", "merged", adapter="b")
    for name, chosen in (("used", {"a": 0.5, "b": 1.0}), ("b", "b")):
        expected = lora_fx.merge(tuned, adapters=chosen).state_dict()
        found = load_file(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_adapters_apart_that_are_not_all_in_use_are_refused(tmp_path):
    tuned = alone(DORA, "a")
    lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")
    with pytest.raises(ExportError, match=r"b .*is not in use"):
        lora_fx.export(tuned, tmp_path / "out", "pt2", (given(),))


def test_peft_gets_all_and_computes_the_same(tmp_path):
    pytest.importorskip("peft")
    done = lora_fx.export(two(), tmp_path / "out", "peft", (given(),), verify=True)
    assert done.difference is not None
    assert (tmp_path / "out" / "b" / "adapter_config.json").exists()


def test_onnx_has_a_file_for_each_and_runs_each_alone(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = lora_fx.export(two(), tmp_path / "model.onnx", "onnx", (given(),), verify=True)
    assert done.difference is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx_adapter", "b.onnx_adapter", "model.onnx"]


def test_onnx_cannot_have_dora_and_plain_lora_at_one_weight(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, alone(DORA, "b"), adapter="b")
    with pytest.raises(ExportError, match="both kinds at one weight"):
        lora_fx.export(tuned, tmp_path / "model.onnx", "onnx", (given(),))


def test_a_name_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no adapter is called 'c'"):
        lora_fx.export(two(), tmp_path / "out", "peft", adapter="c")
