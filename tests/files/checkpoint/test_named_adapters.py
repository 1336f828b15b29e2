"""Of a directory with several adapters, the one that is named goes into a checkpoint; never one in place of another."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

import lora_fx
from lora_fx import merge_checkpoint
from lora_fx.errors import MergeError
from tests.support.merging import assert_same, contents, loaded, write_base
from tests.support.twoadapters import BOTH, WIDE, alone, model, two


@pytest.fixture
def checkpoint(tmp_path):
    return write_base(tmp_path / "base", {name: tensor.clone() for name, tensor in model().state_dict().items()})


@pytest.fixture
def several(tmp_path):
    """A directory with "a" and "b", both at blocks.*.k."""
    lora_fx.save(two(), tmp_path / "several")
    return tmp_path / "several"


def run(*words: object):
    from lora_fx.cli import main

    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(("name", "rules"), [("a", BOTH), ("b", WIDE)])
def test_the_named_adapter_is_merged_as_if_it_were_alone(tmp_path, checkpoint, several, name, rules):
    merge_checkpoint(checkpoint, several, tmp_path / "out", adapter=name)
    expected = lora_fx.merge(alone(rules, name)).state_dict()
    assert_same(loaded(tmp_path / "out"), dict(expected))


@pytest.mark.parametrize(("name", "rules"), [("a", BOTH), ("b", WIDE)])
def test_the_command_merges_the_named_adapter(tmp_path, checkpoint, several, name, rules):
    result = run("merge", checkpoint, several, "-o", tmp_path / "out", "--adapter", name)
    assert result.exit_code == 0, result.output
    assert_same(loaded(tmp_path / "out"), dict(lora_fx.merge(alone(rules, name)).state_dict()))


def test_several_adapters_for_one_weight_must_be_named(tmp_path, checkpoint, several):
    with pytest.raises(MergeError, match=r"several adapters for one weight\n.*blocks\.0\.k +a, b") as caught:
        merge_checkpoint(checkpoint, several, tmp_path / "out")
    assert "adapter=…, --adapter" in str(caught.value)
    result = run("merge", checkpoint, several, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--adapter" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_directory_has_not_is_an_error_that_tells_the_names(tmp_path, checkpoint, several):
    with pytest.raises(MergeError, match="no adapter is called 'c'; there are a, b"):
        merge_checkpoint(checkpoint, several, tmp_path / "out", adapter="c")
    result = run("merge", checkpoint, several, "-o", tmp_path / "out", "--adapter", "c")
    assert result.exit_code == 2
    assert "there are a, b" in result.stderr
    assert not (tmp_path / "out").exists()


def apart():
    """Return a model with two adapters that share no weight."""
    rule = {"match": {"name": "**.out"}, "lora": {"r": 2, "init": "random", "adapter": "b"}}
    torch.manual_seed(3)
    return lora_fx.apply(model(), {**BOTH, "rules": [*BOTH["rules"], rule]}, backend="modules")


def test_adapters_that_share_no_weight_are_merged_together_or_by_name(tmp_path, checkpoint):
    lora_fx.save(apart(), tmp_path / "apart")
    merge_checkpoint(checkpoint, tmp_path / "apart", tmp_path / "both")
    assert_same(loaded(tmp_path / "both"), dict(lora_fx.merge(apart()).state_dict()))
    merge_checkpoint(checkpoint, tmp_path / "apart", tmp_path / "one", adapter="b")
    assert_same(loaded(tmp_path / "one"), dict(lora_fx.merge(apart(), adapters="b").state_dict()))


def test_of_several_directories_each_gives_the_one_of_the_name(tmp_path, checkpoint, several):
    lora_fx.save(apart(), tmp_path / "apart")
    merge_checkpoint(checkpoint, [several, tmp_path / "apart"], tmp_path / "out", adapter="b")
    base, found = loaded(checkpoint), loaded(tmp_path / "out")
    one, other = (lora_fx.merge(tuned, adapters="b").state_dict() for tuned in (two(), apart()))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, one[name] + other[name] - base[name], atol=1e-6, rtol=1e-6)


def test_a_merge_of_one_adapter_is_not_finished_with_another(tmp_path, checkpoint, several):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoint(checkpoint, several, tmp_path / "out", adapter="a", progress=stop)
    assert not (tmp_path / "out" / "config.json").exists()
    before = contents(tmp_path / "out")
    with pytest.raises(MergeError, match="unfinished merge of something else"):
        merge_checkpoint(checkpoint, several, tmp_path / "out", adapter="b")
    assert contents(tmp_path / "out") == before
    merge_checkpoint(checkpoint, several, tmp_path / "out", adapter="a")
    assert_same(loaded(tmp_path / "out"), dict(lora_fx.merge(alone(BOTH, "a")).state_dict()))
