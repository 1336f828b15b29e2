"""Exports of a model with several adapters: one by name, each, or what is in use; never one in place of another."""

from __future__ import annotations

import pytest
import torch

import lora_fx
from lora_fx.errors import ExportError
from tests.support.clitools import run
from tests.support.twoadapters import BOTH, DORA, WIDE, alone, given, two


@pytest.mark.parametrize("target", ["gguf", "kohya", "mlx", "diffusers", "vllm", "pt2", "executorch"])
def test_several_at_one_weight_are_refused_by_name(target, tmp_path):
    tuned = two()
    lora_fx.use(tuned, ["a", "b"])
    with pytest.raises(ExportError, match=r"blocks\.0\.k") as caught:
        lora_fx.export(tuned, tmp_path / "out", target, (given(),))
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


@pytest.mark.parametrize("target", ["gguf", "kohya", "mlx", "diffusers", "vllm"])
def test_files_of_factors_want_a_name_where_one_of_several_is_in_use(target, tmp_path):
    with pytest.raises(ExportError, match=r"blocks\.0\.k +a, b"):
        lora_fx.export(two(), tmp_path / "out", target, (given(),))


@pytest.mark.parametrize("chosen", [{"b": 0.5}, None, {"a": 1.0, "b": 0.5}])
@pytest.mark.parametrize("target", ["pt2", "executorch"])
def test_a_program_holds_no_mixture_of_adapters(target, chosen, tmp_path):
    tuned = two()
    lora_fx.use(tuned, chosen)
    with pytest.raises(ExportError, match="has one adapter for each weight"):
        lora_fx.export(tuned, tmp_path / "out", target, (given(),))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("how", "name"), [("used", "a"), ("used", "b"), ("named", "b")])
def test_a_program_has_the_adapter_that_is_used_or_named(how, name, tmp_path):
    tuned = two()
    if how == "used":
        lora_fx.use(tuned, name)
    named = {"adapter": name} if how == "named" else {}
    done = lora_fx.export(tuned, tmp_path / "model.pt2", "pt2", (given(),), verify=True, **named)
    assert done.difference is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.safetensors", "model.base.safetensors", "model.pt2",
    ]  # fmt: skip
    program = torch.export.load(tmp_path / "model.pt2").module()
    with lora_fx.use(tuned, name):
        torch.testing.assert_close(program(x=given()), tuned(given()), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [{}, {"adapter": "b"}])
def test_executorch_has_the_adapter_that_is_used_or_named(named, tmp_path):
    pytest.importorskip("executorch")
    tuned = two()
    lora_fx.use(tuned, "a" if named else "b")
    done = lora_fx.export(tuned, tmp_path / "model.pte", "executorch", (given(),), verify=True, **named)
    assert done.difference is not None


def test_onnx_has_a_named_adapter_as_if_it_were_alone(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = lora_fx.export(two(), tmp_path / "model.onnx", "onnx", (given(),), verify=True, adapter="b")
    assert done.difference is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.onnx_adapter", "model.onnx"]


def test_onnx_has_a_named_adapter_of_two_kinds_at_one_weight(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, alone(DORA, "b"), adapter="b")
    done = lora_fx.export(tuned, tmp_path / "model.onnx", "onnx", (given(),), verify=True, adapter="b")
    assert done.difference is not None


def test_adapters_apart_that_are_not_all_in_use_are_refused(tmp_path):
    tuned = alone(DORA, "a")
    lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")
    with pytest.raises(ExportError, match=r"b .*is not in use"):
        lora_fx.export(tuned, tmp_path / "out", "kohya")
    lora_fx.export(tuned, tmp_path / "model.pt2", "pt2", (given(),), verify=True)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("name", "rules"), [("a", BOTH), ("b", WIDE)])
def test_the_command_writes_the_named_adapter(tmp_path, name, rules):
    lora_fx.save(two(), tmp_path / "several")
    lora_fx.export(alone(rules, name), tmp_path / "alone.safetensors", "kohya")
    arguments = ["export", "tests.support.twoadapters:model", tmp_path / "several", "--target", "kohya"]
    written = tmp_path / "named.safetensors"
    result = run(*arguments, "--adapter", name, "-o", written)
    assert result.exit_code == 0, result.output
    assert written.read_bytes() == (tmp_path / "alone.safetensors").read_bytes()


def test_the_command_asks_for_a_name_and_tells_the_names(tmp_path):
    lora_fx.save(two(), tmp_path / "several")
    arguments = ["export", "tests.support.twoadapters:model", tmp_path / "several", "--target", "kohya"]
    result = run(*arguments, "-o", tmp_path / "out.safetensors")
    assert result.exit_code == 2
    assert "name one" in result.stderr
    result = run(*arguments, "-o", tmp_path / "out.safetensors", "--adapter", "c")
    assert result.exit_code == 2
    assert "there are a, b" in result.stderr
    assert not (tmp_path / "out.safetensors").exists()


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
