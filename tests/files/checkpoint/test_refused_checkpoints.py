"""What a streaming merge refuses, before anything is written, and what it says."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lora_fx import merge_checkpoint
from lora_fx.errors import AdapterFileError, MergeError
from tests.support.merging import (
    NORM,
    PREFIX,
    UP,
    Q,
    base_tensors,
    contents,
    factors,
    loaded,
    write_adapter,
    write_base,
)

# -- refusals


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800", "circle"], ids=["long", "NUL", "half", "circle"])
def test_paths_that_no_folder_can_have_are_refused(tmp_path, base, adapter, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("circle", "circle")
    for given, out in ((base, path), (path, "out")):
        with pytest.raises(MergeError, match="nothing was written") as error:
            merge_checkpoint(given, adapter, out)
        assert len(str(error.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nested", [False, True])
def test_quantised_base_is_refused_by_its_configuration(tmp_path, adapter, nested):
    quantised = {"quantization_config": {"quant_method": "gptq"}}
    base = write_base(tmp_path / "base", base_tensors(), config={"text_config": quantised} if nested else quantised)
    with pytest.raises(MergeError, match="quant_method gptq"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_weight_of_integers_is_refused_by_its_name(tmp_path):
    before = base_tensors() | {f"{UP}.weight": torch.zeros(96, 48, dtype=torch.int8)}
    base, adapter = write_base(tmp_path / "base", before), write_adapter(tmp_path / "adapter", factors(UP, 96, 48))
    with pytest.raises(MergeError, match="is stored as I8") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == [f"{UP}.weight"]


def test_merge_that_would_not_be_finite_names_the_tensor_and_leaves_no_checkpoint(tmp_path):
    before = {"fc.weight": torch.full((48, 32), 6e4, dtype=torch.float16)}
    adapter = {key: tensor.abs() * 1e3 for key, tensor in factors("fc", 48, 32).items()}
    base = write_base(tmp_path / "base", before)
    with pytest.raises(MergeError, match="NaN or infinite") as caught:
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", adapter), tmp_path / "out")
    assert [key for key, _ in caught.value.problems] == ["fc.weight"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_value_too_large_for_the_out_dtype_names_the_tensor(tmp_path, adapter):
    before = base_tensors(torch.float32) | {"big": torch.tensor([1e6])}
    with pytest.raises(MergeError, match="too large for float16") as caught:
        merge_checkpoint(write_base(tmp_path / "base", before), adapter, tmp_path / "out", out_dtype="float16")
    assert [key for key, _ in caught.value.problems] == ["big"]


def test_dora_beside_another_adapter_is_refused(tmp_path, base, adapter):
    tensors = factors(Q, 48, 48) | {f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(48)}
    dora = write_adapter(tmp_path / "dora", tensors, use_dora=True)
    with pytest.raises(MergeError, match="has DoRA and another adapter"):
        merge_checkpoint(base, [adapter, dora], tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "shape", "config", "reason"),
    [
        (f"{Q}.lora_B.bias", (48,), {"lora_bias": True}, "lora_B has a bias"),
        ("embed.token_adapter.trainable_tokens_delta", (1, 48), {"trainable_token_indices": [3]}, "trains rows of it"),
    ],
)
def test_what_needs_the_values_of_the_base_is_refused(key, shape, config, reason, tmp_path, base):
    tensors = factors(Q, 48, 48) | {PREFIX + key: torch.ones(shape)}
    with pytest.raises(MergeError, match=reason):
        merge_checkpoint(base, write_adapter(tmp_path / "adapter", tensors, **config), tmp_path / "out")


def test_adapter_given_twice_is_refused(tmp_path, base, adapter):
    with pytest.raises(MergeError, match="given twice"):
        merge_checkpoint(base, [adapter, adapter / ".." / "adapter"], tmp_path / "out")
    with pytest.raises(MergeError, match="no adapter"):
        merge_checkpoint(base, [], tmp_path / "out")


def test_values_of_the_same_module_from_two_adapters_must_agree(tmp_path, base):
    folders = []
    for name in ("a", "b"):
        tensors = factors(Q, 48, 48) | {f"{PREFIX}{NORM}.weight": torch.randn(48)}
        folders.append(write_adapter(tmp_path / name, tensors, modules_to_save=["norm"]))
    with pytest.raises(MergeError, match="trained whole by several adapters"):
        merge_checkpoint(base, folders, tmp_path / "out")


def test_directory_that_is_not_ours_is_refused_before_anything_is_written(tmp_path, base, adapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(MergeError, match="is there already; nothing was written"):
        merge_checkpoint(base, adapter, out)
    assert contents(out) == {"mine.txt": b"mine"}
    with pytest.raises(MergeError, match="is there already, and no directory"):
        merge_checkpoint(base, adapter, out / "mine.txt")


def test_finished_merge_is_not_written_over(tmp_path, base, adapter):
    merge_checkpoint(base, adapter, tmp_path / "out")
    with pytest.raises(MergeError, match="is there already"):
        merge_checkpoint(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_result_must_lie_apart_from_the_base(base, adapter, where):
    with pytest.raises(MergeError, match="is the base itself"):
        merge_checkpoint(base, adapter, base / where)


def test_wrong_options_are_told(base, adapter, tmp_path):
    with pytest.raises(ValueError, match="out_dtype is 'int8'"):
        merge_checkpoint(base, adapter, tmp_path / "out", out_dtype="int8")
    with pytest.raises(ValueError, match="rounding is 'up'"):
        merge_checkpoint(base, adapter, tmp_path / "out", rounding="up")


def test_what_is_no_adapter_or_no_checkpoint_is_told(tmp_path, base, adapter):
    with pytest.raises(AdapterFileError, match=r"adapter_config\.json: does not exist"):
        merge_checkpoint(base, base, tmp_path / "out")
    with pytest.raises(MergeError, match=r"has no model\.safetensors"):
        merge_checkpoint(adapter, adapter, tmp_path / "out")
    with pytest.raises(MergeError, match="not a directory"):
        merge_checkpoint(tmp_path / "nowhere", adapter, tmp_path / "out")


# -- damaged checkpoints


def header_of(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}, **more}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a header of 0 bytes"),
        ((10**12).to_bytes(8, "little"), "a header of 1,000,000,000,000 bytes"),
        (header_of(b"nonsense"), "Expecting value"),
        (header_of([1]), "no JSON object"),
        (header_of(b'{"a": 1, "a": 2}'), "twice"),
        (header_of({"a": 1}), "describes no tensor"),
        (header_of(one(dtype="X9"), bytes(8)), "describes no tensor"),
        (header_of(one(shape=(-2,)), bytes(8)), "not below 0"),
        (header_of(one(shape=(3,)), bytes(8)), "does not take 8 bytes"),
        (header_of(one(offsets=(4, 12)), bytes(12)), "begins at byte 4, not at 0"),
        (header_of(one(), bytes(9)), "describes 8 bytes, the file has 9"),
        (header_of(one(), bytes(7)), "describes 8 bytes, the file has 7"),
        (header_of(one(b={"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}), bytes(8)), "b begins at byte 4"),
        (header_of(one(__metadata__={"a": 1}), bytes(8)), "not a table of strings"),
    ],
)
def test_damaged_file_is_told_before_anything_is_written(tmp_path, base, adapter, content, told):
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(MergeError) as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", ".hidden.safetensors", "model.bin"])
def test_index_may_name_only_files_beside_it(tmp_path, sharded, adapter, file):
    path = sharded / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(MergeError, match="which is not a safetensors file beside it"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


def test_index_that_contradicts_the_files_is_told(tmp_path, sharded, adapter):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(MergeError, match="contradicts the files") as caught:
        merge_checkpoint(sharded, adapter, tmp_path / "out")
    assert caught.value.problems == (("more", "is not in model-00001-of-00002.safetensors"),)


def test_tensor_in_two_files_is_told(tmp_path, sharded, adapter):
    tensors = loaded(sharded)
    save_file({f"{Q}.weight": tensors[f"{Q}.weight"], "steps": tensors["steps"]}, sharded / "x.safetensors")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["steps"] = "x.safetensors"
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MergeError, match="tensors in two files"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


def test_two_checkpoints_in_one_directory_are_ambiguous(tmp_path, sharded, adapter):
    save_file(loaded(sharded), sharded / "model.safetensors")
    with pytest.raises(MergeError, match="which checkpoint is meant"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")


# -- what is carried along


def linked(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_link_that_leaves_the_checkpoint_is_not_copied_along(tmp_path, base, adapter, name):
    (tmp_path / "secret").write_text('{"password": "x"}')
    linked(base, name, tmp_path / "secret")
    with pytest.raises(MergeError, match="has what is not copied along") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert caught.value.problems == ((name, f"is a link to {tmp_path / 'secret'}"),)
    assert not (tmp_path / "out").exists()


def test_links_within_a_checkpoint_and_those_of_a_cache_are_followed(tmp_path, base, adapter):
    (base / "vocabulary.json").symlink_to("tokenizer.json")
    merge_checkpoint(base, adapter, tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in base.iterdir():
        shutil.copy(path, blobs / path.name)
        linked(snapshot, path.name, blobs / path.name)
    merge_checkpoint(snapshot, adapter, tmp_path / "cached")
    assert contents(tmp_path / "cached") == contents(tmp_path / "plain")


def test_pipe_and_link_to_nowhere_are_not_copied_along(tmp_path, base, adapter):
    os.mkfifo(base / "pipe")
    linked(base, "lost", base / "nowhere")
    with pytest.raises(MergeError, match="has what is not copied along") as caught:
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert caught.value.problems == (("lost", "is no file"), ("pipe", "is no file"))
