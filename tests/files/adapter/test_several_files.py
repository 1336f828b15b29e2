"""Several adapters of one model on disk: all of them or one, beside each other or at one weight."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.twoadapters import BACKENDS, BOTH, DORA, WIDE, alone, factors, given, model, two


def same(a: nn.Module, b: nn.Module, name: str) -> bool:
    first, second = factors(a, name), factors(b, name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@BACKENDS
def test_adapters_at_one_weight_come_back_each_with_its_values(inputs, tmp_path):
    tuned = two(inputs)
    lora_fx.save(tuned, tmp_path)
    back = lora_fx.load(model(), tmp_path, inputs)
    assert [one.name for one in lora_fx.list_adapters(back) if one.active] == ["a"]
    for name in ("a", "b"):
        assert same(tuned, back, name)
        lora_fx.use(tuned, name)
        lora_fx.use(back, name)
        assert torch.equal(back(given()), tuned(given()))


def test_adapters_that_share_no_weight_are_all_in_use(tmp_path):
    tuned = alone(DORA, "a")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")
    lora_fx.use(tuned, ["a", "b"])
    lora_fx.save(tuned, tmp_path)
    back = lora_fx.load(model(), tmp_path)
    assert [one.name for one in lora_fx.list_adapters(back) if one.active] == ["a", "b"]
    assert torch.equal(back(given()), tuned(given()))


def test_one_adapter_is_written_as_if_it_were_alone(tmp_path):
    tuned = two()
    lora_fx.save(tuned, tmp_path / "one", adapter="b")
    single = alone(WIDE, "b")
    lora_fx.rename(single, "default", "b")
    lora_fx.save(single, tmp_path / "alone")
    assert not (tmp_path / "one" / "a").exists()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_each_file_has_its_own_rules(tmp_path):
    lora_fx.save(two(), tmp_path / "first")
    lora_fx.save(lora_fx.load(model(), tmp_path / "first"), tmp_path / "again")
    for folder in (tmp_path / "first", tmp_path / "again"):
        for path, rules in ((folder, BOTH), (folder / "b", WIDE)):
            header = read_header(path)
            assert header["rules"]["rules"][0]["match"]["name"] == [rules["rules"][0]["match"]["name"]]
    for name in ("adapter_model.safetensors", "b/adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def read_header(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        (text,) = (value for key, value in file.metadata().items() if key != "format")
    return json.loads(text)


def test_a_directory_of_several_is_added_whole_or_not_at_all(tmp_path):
    source = two()
    lora_fx.save(source, tmp_path)
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, tmp_path)
    assert [one.name for one in lora_fx.list_adapters(tuned)] == ["default", "a", "b"]
    assert same(tuned, source, "a")
    assert same(tuned, source, "b")
    lora_fx.drop(tuned, "a")
    with pytest.raises(ValueError, match="'b' already"):
        lora_fx.add(tuned, tmp_path)
    assert [one.name for one in lora_fx.list_adapters(tuned)] == ["default", "b"]
    with pytest.raises(ValueError, match="several adapters in it"):
        lora_fx.add(tuned, tmp_path, adapter="c")


def test_an_adapter_that_is_not_there_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapter is called 'c'; there are a, b"):
        lora_fx.save(two(), tmp_path, adapter="c")
    assert not list(tmp_path.iterdir())


def test_two_adapters_of_one_name_are_an_error(tmp_path):
    lora_fx.save(two(), tmp_path)
    other = tmp_path / "other"
    tuned = two()
    lora_fx.drop(tuned, "a")
    lora_fx.rename(tuned, "b", "a")
    lora_fx.save(tuned, other)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "b" / name).write_bytes((other / name).read_bytes())
    with pytest.raises(lora_fx.AdapterFileError, match="one name"):
        lora_fx.load(model(), tmp_path)


@pytest.mark.parametrize("chosen", ["b", ["a", "b"], {"a": 0.5, "b": -1.0}])
def test_a_merge_folds_what_is_asked_for(chosen):
    tuned = two()
    expected = two()
    lora_fx.use(expected, chosen)
    merged = lora_fx.merge(tuned, adapters=chosen)
    assert torch.equal(merged(given()), lora_fx.merge(expected)(given()))
    assert [one.name for one in lora_fx.list_adapters(tuned) if one.active] == ["a"]
    with lora_fx.use(tuned, chosen):
        assert torch.equal(lora_fx.merge(tuned)(given()), merged(given()))


def test_a_copy_uses_what_its_maker_used():
    tuned = two()
    with lora_fx.use(tuned, "b"):
        twin = copy.deepcopy(tuned)
        expected = tuned(given())
    assert torch.equal(twin(given()), expected)
    assert not torch.equal(tuned(given()), expected)


def test_modules_that_are_trained_whole_stay_with_the_adapter_that_trained_them(tmp_path):
    rules = {
        "version": 1,
        "rules": [{"match": {"name": "**.q"}, "lora": {"r": 2, "adapter": "zeta"}}],
        "train": ["blocks.0.out"],
    }
    tuned = lora_fx.apply(model(), rules, backend="modules")
    with torch.no_grad():
        tuned.blocks[0].out.weight.add_(1)
    lora_fx.add(tuned, {"version": 1, "rules": [{"match": {"name": "**.q"}, "lora": {"r": 1}}]}, adapter="default")
    lora_fx.save(tuned, tmp_path)
    read = lora_fx.load(model(), tmp_path)
    for name in ("zeta", "default"):
        lora_fx.use(tuned, name)
        lora_fx.use(read, name)
        assert torch.equal(read(given()), tuned(given()))
