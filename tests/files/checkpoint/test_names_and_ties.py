"""A streaming merge finds each name once or refuses it; tied weights stay apart."""

from __future__ import annotations

import json

import pytest
import torch

import lora_fx
from lora_fx import merge_checkpoint
from lora_fx.errors import AdapterMismatchError, MergeError
from tests.support import zoo
from tests.support.merging import (
    PREFIX,
    UP,
    Q,
    assert_same,
    base_tensors,
    delta,
    factors,
    in_memory,
    loaded,
    weight,
    write_adapter,
    write_base,
)

# -- names


@pytest.mark.parametrize(
    ("in_base", "in_adapter"), [("model.", ""), ("", "model."), ("model.language_model.", "language_model.")]
)
def test_prefix_that_only_one_of_them_has_is_found(tmp_path, in_base, in_adapter):
    before = {f"{in_base}layers.{n}.fc.weight": weight(48, 32) for n in range(2)}
    adapter = {**factors(f"{in_adapter}layers.0.fc", 48, 32), **factors(f"{in_adapter}layers.1.fc", 48, 32)}
    base = write_base(tmp_path / "base", before)
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    for n in range(2):
        exact = before[f"{in_base}layers.{n}.fc.weight"].float() + delta(adapter, f"{in_adapter}layers.{n}.fc")
        assert torch.equal(loaded(tmp_path / "out")[f"{in_base}layers.{n}.fc.weight"], exact.to(torch.bfloat16))


def test_names_that_fit_under_several_prefixes_are_refused(tmp_path):
    base = write_base(tmp_path / "base", {f"{side}.fc.weight": weight(48, 32) for side in ("encoder", "decoder")})
    with pytest.raises(MergeError, match="fit the checkpoint in several ways") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("fc", 48, 32)), tmp_path / "out")
    assert [where for where, _ in caught.value.problems] == ["with 'decoder.' before", "with 'encoder.' before"]


def test_all_missing_names_are_told_at_once_with_near_ones(tmp_path, base):
    adapter = {**factors("model.layers.0.query", 48, 48), **factors(UP, 96, 48), **factors("model.layers.7.x", 4, 4)}
    with pytest.raises(AdapterMismatchError, match="2 of 3 adapted weights are missing") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    missing = {key: reason for key, _, reason in caught.value.mismatches}
    assert sorted(missing) == ["model.layers.0.query.weight", "model.layers.7.x.weight"]
    assert f"nearest: {Q}.weight" in missing["model.layers.0.query.weight"]


def test_one_site_that_fits_only_elsewhere_is_not_merged_there(tmp_path):
    """`vision.fc` is not the `fc` of a text model, though its end is."""
    base = write_base(tmp_path / "base", {"fc.weight": weight(48, 32), "up.weight": weight(48, 32)})
    adapter = {**factors("up", 48, 32), **factors("vision.fc", 48, 32)}
    with pytest.raises(AdapterMismatchError) as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert [key for key, *_ in caught.value.mismatches] == ["vision.fc.weight"]


def test_other_shapes_are_told(tmp_path, base):
    with pytest.raises(AdapterMismatchError) as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors(UP, 96, 40)), tmp_path / "out")
    assert caught.value.mismatches == ((f"{UP}.weight", "[96, 40]", "[96, 48]"),)


def test_adapter_that_was_trained_on_another_base_is_told(tmp_path):
    model = zoo.Mlp()
    lora_fx.save(lora_fx.apply(model, zoo.rules("fc1"), backend="modules"), tmp_path / "adapter")
    other = {name: value + 1 for name, value in model.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match="is another base") as caught:
        merge_checkpoint(write_base(tmp_path / "base", other), tmp_path / "adapter", tmp_path / "out")
    assert [key for key, *_ in caught.value.mismatches] == ["fc1.weight"]


@pytest.mark.parametrize(
    "keys", [["mlp.experts.0.up_proj.weight", "mlp.experts.1.up_proj.weight"], ["mlp.experts.up_proj.weight"]]
)
def test_experts_are_refused_by_name_with_the_reason(tmp_path, keys):
    shape = (2, 48, 48) if len(keys) == 1 else (48, 48)
    base = write_base(tmp_path / "base", {key: weight(*shape) for key in keys})
    adapter = write_adapter(tmp_path / "adapter", factors("mlp.experts.up_proj", 48, 48))
    with pytest.raises((MergeError, AdapterMismatchError), match=r"mlp\.experts\.up_proj\.weight .*expert"):
        merge_checkpoint(base, adapter, tmp_path / "out")


# -- tied weights


def test_adapted_head_that_is_tied_becomes_a_tensor_of_its_own_and_is_no_longer_tied(tmp_path, sharded):
    config = {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-06}
    (sharded / "config.json").write_text(json.dumps(config))
    adapter = {**factors(Q, 48, 48), **factors("lm_head", 50, 48)}
    report = merge_checkpoint(sharded, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    before, after = loaded(sharded), loaded(tmp_path / "out")
    head = (before["model.embed_tokens.weight"].float() + delta(adapter, "lm_head")).to(torch.bfloat16)
    assert_same(after, in_memory(before, adapter, Q) | {"lm_head.weight": head})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"tie_word_embeddings": False}
    assert report.untied
    assert "tie_word_embeddings" in str(report)


def test_adapted_head_that_is_stored_is_merged_and_untied_or_it_would_be_lost_when_loaded(tmp_path):
    before = base_tensors() | {"lm_head.weight": weight(50, 48)}
    base = write_base(tmp_path / "base", before, config={"tie_word_embeddings": True})
    adapter = factors("lm_head", 50, 48)
    merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), in_memory(before, adapter, "lm_head"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_head_that_is_neither_stored_nor_tied_is_missing(tmp_path, base):
    with pytest.raises(AdapterMismatchError, match="tie_word_embeddings is false"):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("lm_head", 50, 48)), tmp_path / "out")


def test_untying_is_refused_where_the_forward_asks_for_it(tmp_path):
    base = write_base(
        tmp_path / "base", {"shared.weight": weight(50, 48)}, config={"model_type": "t5", "tie_word_embeddings": True}
    )
    with pytest.raises(MergeError, match="t5 computes something else"):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", factors("lm_head", 50, 48)), tmp_path / "out")


def test_embedding_trained_whole_is_refused_where_the_head_would_follow(tmp_path):
    base = write_base(tmp_path / "base", base_tensors(), config={"tie_word_embeddings": True})
    tensors = factors(Q, 48, 48) | {f"{PREFIX}model.embed_tokens.weight": torch.randn(50, 48)}
    adapter = write_adapter(tmp_path / "adapter", tensors, modules_to_save=["embed_tokens"])
    with pytest.raises(MergeError, match="the head shares it"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    together = write_adapter(tmp_path / "tied", tensors, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert not merge_checkpoint(base, together, tmp_path / "out").untied
