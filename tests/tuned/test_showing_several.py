"""What tells of a model with several adapters names each of them, and hides none."""

from __future__ import annotations

import torch

import lora_fx
from tests.support.twoadapters import BACKENDS, given, model, two


@BACKENDS
def test_every_view_of_the_model_names_each_adapter(inputs):
    tuned = two(inputs)
    lora_fx.use(tuned, {"a": 0.5})
    shown = str(tuned.blocks[0].k)
    assert "adapter=a weight=0.5" in shown
    assert "adapter=b (off)" in shown
    report = str(lora_fx.inspect(tuned))
    assert "a weight=0.5" in report
    assert "b (off)" in report
    assert {(site.adapter, site.weight) for site in lora_fx.inspect(tuned).sites} == {("a", 0.5), ("b", 0.0)}


def test_norms_and_audits_have_a_row_for_each():
    tuned = two()
    names = [row.name for row in lora_fx.deltas(tuned).sites]
    assert len(set(names)) == len(names) == 12
    assert "blocks.0.k (a)" in names
    assert "blocks.0.k (b)" in names
    assert lora_fx.deltas(tuned).to_svg()
    assert len(lora_fx.audit(tuned).sites) == 12


def test_an_audit_of_a_directory_has_all_of_its_adapters(tmp_path):
    lora_fx.save(two(), tmp_path)
    assert {site.path for site in lora_fx.audit(tmp_path).sites} == {site.path for site in lora_fx.audit(two()).sites}


def test_a_record_of_training_tells_them_apart(tmp_path):
    tuned = two()
    recorder = lora_fx.Recorder(tuned, tmp_path / "run.jsonl", every=1)
    recorder.step(1.0)
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    names = [site.name for site in record.sites]
    assert len(set(names)) == len(names) == 12


@BACKENDS
def test_a_diff_shows_all_of_them(inputs):
    text = str(lora_fx.diff(model(), two(inputs), inputs))
    assert ".lora_B.a(" in text
    assert ".lora_B.b(" in text
    assert not lora_fx.diff(two(inputs), two(inputs), inputs)


def test_folding_tells_what_was_in_use():
    tuned = two()
    lora_fx.use(tuned, "b")
    result = lora_fx.remerged(tuned)
    assert set(result.folded) == {f"blocks.{n}.{name}" for n in range(3) for name in ("k", "out")}
    assert torch.allclose(result.model(given()), tuned(given()), atol=1e-6)


def test_what_use_returns_tells_what_is_in_use():
    tuned = two()
    choice = lora_fx.use(tuned, "b")
    assert repr(choice) == "<in use: b>"
    assert repr(lora_fx.use(tuned, {"a": 0.7, "b": -0.3})) == "<in use: 0.7 · a + -0.3 · b>"
    assert repr(choice) == "<not in use: b>"
    assert repr(lora_fx.use(tuned, None)) == "<in use: the base>"
    assert repr(choice) == "<not in use: b>"


def test_what_use_returns_in_a_block_tells_until_when():
    tuned = two()
    choice = lora_fx.use(tuned, ["a", "b"])
    with choice:
        assert repr(choice) == "<in use until the end of the block: a + b>"
    assert repr(choice) == "<no longer in use: a + b>"
