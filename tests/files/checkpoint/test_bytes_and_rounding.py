"""What is carried over byte by byte, what is rounded and how, and that neither depends on tiles or threads."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from lora_fx import merge_checkpoint
from lora_fx.files.checkpoint import rawbytes, tiles
from lora_fx.files.checkpoint.rounding import Noise, round_into
from lora_fx.files.safetensors import read_raw
from tests.support.merging import (
    UP,
    Q,
    assert_same,
    base_tensors,
    contents,
    delta,
    factors,
    failing,
    in_memory,
    loaded,
    write_adapter,
    write_base,
)

# -- what is carried over


def test_folders_are_carried_and_weights_in_other_forms_are_left_out(tmp_path, base, adapter):
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.gguf", "adapter_config.json", ".hidden"):
        (base / name).write_text("x")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    names = ["1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(contents(tmp_path / "out")) == names
    assert report.left_out == ("model.gguf", "pytorch_model.bin")
    assert "pytorch_model.bin" in str(report)


def test_links_of_a_cache_become_files(tmp_path, base, adapter, both):
    (tmp_path / "blob").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(tmp_path / "blob")
    before = contents(tmp_path / "base")
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert contents(base) == before


# -- dtypes and rounding


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_out_dtype_is_that_of_all_floats_rounded_once_and_config_says_so(tmp_path, adapter, both, dtype, shards):
    tensors = base_tensors(torch.float32)
    parts = (
        [tensors] if shards == 1 else [{"steps": tensors["steps"]}, {k: v for k, v in tensors.items() if k != "steps"}]
    )
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "hidden_size": 48}}
    base = write_base(tmp_path / "base", *parts, config=config)
    merge_checkpoint(base, adapter, tmp_path / "out", out_dtype=dtype)
    kind = getattr(torch, dtype)
    exact = in_memory(tensors, both, Q, UP)
    expected = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in exact.items()}
    assert_same(loaded(tmp_path / "out"), expected)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]) == (dtype, {"dtype": dtype, "hidden_size": 48})
    if shards == 2:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


HALVES = (torch.bfloat16, torch.float16)


def test_tensors_of_changed_files_begin_at_multiples_of_their_size(tmp_path, adapter):
    before = {**base_tensors(torch.float32), "odd": torch.randn(3), "wide": torch.arange(5)}
    merge_checkpoint(write_base(tmp_path / "base", before), adapter, tmp_path / "out", out_dtype="float16")
    file = read_raw(tmp_path / "out" / "model.safetensors")
    assert file.data_start % 8 == 0
    for name, entry in file.tensors.items():
        assert entry.start % loaded(tmp_path / "out")[name].itemsize == 0


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((value, dtype) for value in (1.00123, -0.3337, -5.1e-8, 0.0, 1.0, 60001.0) for dtype in HALVES),
        (3e-39, torch.bfloat16),  # below the normal numbers
        (3e-9, torch.float16),
    ],
)
def test_stochastic_rounding_gives_one_of_the_two_neighbours_and_is_right_in_the_mean(value, dtype):
    wide = torch.full((1 << 16,), value)
    out = torch.empty_like(wide, dtype=dtype)
    round_into(wide, out, Noise(0, "w"), 0)
    values = out.double().unique()
    nearest = torch.tensor(value).to(dtype).double()
    assert nearest in values
    assert len(values) == (1 if nearest == torch.tensor(value).double() else 2)
    gap = float(values.max() - values.min())
    assert abs(float(out.double().mean()) - float(wide[0].double())) <= 4 * gap / 2 / 2**8


def test_stochastic_rounding_does_not_depend_on_how_a_tensor_is_cut_up():
    wide, whole = torch.randn(5000), torch.empty(5000, dtype=torch.bfloat16)
    round_into(wide, whole, Noise(3, "w"), 0)
    for size in (1, 7, 8, 4096):
        parts = torch.empty_like(whole)
        for start in range(0, 5000, size):
            round_into(wide[start : start + size], parts[start : start + size], Noise(3, "w"), start)
        assert torch.equal(parts, whole)


def test_noise_differs_between_tensors_and_seeds():
    first = Noise(0, "a").uniform(0, 100)
    assert not torch.equal(first, Noise(0, "b").uniform(0, 100))
    assert not torch.equal(first, Noise(1, "a").uniform(0, 100))
    assert 0 <= float(first.min()) <= float(first.max()) < 1


def test_what_overflows_stays_infinite_under_stochastic_rounding():
    out = torch.empty(2, dtype=torch.float16)
    round_into(torch.tensor([1e6, -1e6]), out, Noise(0, "w"), 0)
    assert out.tolist() == [float("inf"), float("-inf")]


def test_small_delta_is_lost_to_the_nearest_and_survives_stochastic_rounding(tmp_path):
    before = {"fc.weight": torch.ones(256, 256, dtype=torch.bfloat16)}
    adapter = {key: tensor.abs() * 0.01 for key, tensor in factors("fc", 256, 256).items()}
    base, folder = write_base(tmp_path / "base", before), write_adapter(tmp_path / "adapter", adapter)
    (nearest,) = merge_checkpoint(base, folder, tmp_path / "a").tensors
    (stochastic,) = merge_checkpoint(base, folder, tmp_path / "b", rounding="stochastic").tensors
    assert nearest.survived == 0
    assert abs(stochastic.survived - 1) < 0.2
    exact = float(delta(adapter, "fc").norm() / before["fc.weight"].float().norm())
    assert abs(nearest.relative_delta - exact) < 1e-5 * exact


def test_same_seed_gives_the_same_bytes(tmp_path, base, adapter):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        merge_checkpoint(base, adapter, tmp_path / name, rounding="stochastic", seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") != contents(tmp_path / "c")


# -- tiles


SHAPES = [(1, 1), (512, 768), (333, 1001), (64, 4096), (1000, 48), (20, 40000), (700, 17000), (40000, 20)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 16, 300])
def test_tiles_cover_a_matrix_once_and_are_small(shape, rank):
    seen = torch.zeros(shape, dtype=torch.int8)
    for tile in tiles.tiles(*shape, rank):
        seen[tile.rows, tile.columns] += 1
        assert tile.elements <= 2 * tiles.TILE
        runs = list(tile.runs())
        assert sum(number for *_, number in runs) == tile.elements
    assert bool((seen == 1).all())


@pytest.mark.parametrize("shape", [s for s in SHAPES if min(s) >= 16])
@pytest.mark.parametrize("rank", [1, 7, 16, 128])
@pytest.mark.parametrize("stored", ["out_in", "in_out"])
@pytest.mark.parametrize("scaling", [3, 4])
@pytest.mark.sampled(4)
def test_tiles_have_the_bits_of_one_product(tmp_path, shape, rank, stored, scaling):
    out, inputs = shape
    before = torch.randn(shape)
    adapter = factors("fc", out, inputs, rank)
    tensors = {"fc.weight": before if stored == "out_in" else before.t().contiguous()}
    folder = write_adapter(
        tmp_path / "adapter", adapter, r=rank, lora_alpha=scaling * rank, fan_in_fan_out=stored == "in_out"
    )
    merge_checkpoint(write_base(tmp_path / "base", tensors), folder, tmp_path / "out")
    merged = loaded(tmp_path / "out")["fc.weight"]
    expected = in_memory({"fc.weight": before}, adapter, "fc", scaling=float(scaling))["fc.weight"]
    assert torch.equal(merged if stored == "out_in" else merged.t(), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_does_not_change_the_bytes_and_is_restored(tmp_path, sharded, adapter, threads):
    merge_checkpoint(sharded, adapter, tmp_path / "one")
    torch.set_num_threads(threads)
    merge_checkpoint(sharded, adapter, tmp_path / "several")
    assert torch.get_num_threads() == threads
    assert contents(tmp_path / "one") == contents(tmp_path / "several")


def test_systems_without_positional_reads_or_copies_in_the_kernel_give_the_same_bytes(
    tmp_path, sharded, adapter, monkeypatch
):
    merge_checkpoint(sharded, adapter, tmp_path / "a")
    monkeypatch.setattr(rawbytes, "_POSITIONAL", False)
    monkeypatch.setattr(rawbytes, "_IN_KERNEL", False)
    monkeypatch.setattr(rawbytes, "_CHUNK", 100)
    merge_checkpoint(sharded, adapter, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_file_systems_that_cannot_copy_among_themselves_give_the_same_bytes(tmp_path, sharded, adapter, monkeypatch):
    merge_checkpoint(sharded, adapter, tmp_path / "a")
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    merge_checkpoint(sharded, adapter, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_tile_is_rounded_to_the_nearest_at_once_and_with_noise_row_by_row(monkeypatch):
    calls = []
    monkeypatch.setattr(tiles, "round_into", lambda *given: (calls.append(given), round_into(*given)))
    tile = next(tiles.tiles(512, 14336, 64))
    wide, written = torch.randn(tile.elements), torch.empty(tile.elements, dtype=torch.bfloat16)
    tiles._round(wide, tile, written, None)
    assert calls == []
    assert torch.equal(written, wide.bfloat16())
    tiles._round(wide, tile, written, Noise(0, "w"))
    assert len(calls) == len(list(tile.runs())) > 1
