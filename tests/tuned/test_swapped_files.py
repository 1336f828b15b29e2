"""A file that is swapped in again and again is parsed once, while nothing that it was checked with changes."""

from __future__ import annotations

import gc
import os
import shutil
import time
import weakref

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.dicts import KEPT_TARGETS
from lora_fx.files.adapter import keptfile, swapping
from tests.support.twoadapters import model, two

LATER = 3_000_000_000


@pytest.fixture
def later(monkeypatch):
    """All files seem to have been written three seconds ago."""
    real = time.time_ns
    monkeypatch.setattr(keptfile.time, "time_ns", lambda: real() + LATER)


@pytest.fixture
def reads(monkeypatch):
    """The directories that have been read whole."""
    found, real = [], swapping.read_adapters

    def read(source):
        found.append(source)
        return real(source)

    monkeypatch.setattr(swapping, "read_adapters", read)
    return found


def saved(folder, seed=5, **lora):
    torch.manual_seed(seed)
    rule = {"match": {"name": "**.{k,out}"}, "lora": {"r": 3, "alpha": 3.0, "init": "random", **lora}}
    tuned = lora_fx.apply(model(), {"version": 1, "rules": [rule]}, backend="modules")
    lora_fx.save(tuned, folder)
    return lora_fx.adapter_state(tuned)


def has(tuned, state) -> bool:
    own = lora_fx.adapter_state(tuned, "b")
    return all(torch.equal(own[name.replace(".default.", ".b.")], value) for name, value in state.items())


@pytest.mark.usefixtures("later")
def test_a_file_is_read_whole_once_and_copied_each_time(reads, tmp_path):
    tuned, one, other = two(), saved(tmp_path / "one"), saved(tmp_path / "other", seed=6)
    for _ in range(3):
        lora_fx.swap(tuned, tmp_path / "one", adapter="b")
        assert has(tuned, one)
        lora_fx.swap(tuned, str(tmp_path / "other"), adapter="b")
        assert has(tuned, other)
    assert len(reads) == 2


def test_a_file_that_has_just_been_written_is_read_each_time(reads, tmp_path):
    tuned, state = two(), saved(tmp_path)
    for _ in range(3):
        lora_fx.swap(tuned, tmp_path, adapter="b")
    assert len(reads) == 3
    assert has(tuned, state)


def replaced(folder):
    return saved(folder, seed=7)


def written_in_place(folder):
    state = saved(folder.parent / "new", seed=7)
    for path in (folder.parent / "new").iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return state


def with_the_times_of_before(folder):
    path = folder / "adapter_model.safetensors"
    before = os.stat(path)
    state = written_in_place(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return state


def moved_here(folder):
    state = saved(folder.parent / "new", seed=7)
    shutil.rmtree(folder)
    os.rename(folder.parent / "new", folder)
    return state


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", [replaced, written_in_place, with_the_times_of_before, moved_here])
def test_a_file_that_is_another_one_now_is_read_anew(change, tmp_path):
    tuned, folder = two(), tmp_path / "it"
    saved(folder)
    lora_fx.swap(tuned, folder, adapter="b")
    state = change(folder)
    lora_fx.swap(tuned, folder, adapter="b")
    assert has(tuned, state)


@pytest.mark.usefixtures("later")
def test_a_file_that_was_cut_off_or_is_gone_is_refused_and_nothing_changes(tmp_path):
    tuned, folder = two(), tmp_path / "it"
    state = saved(folder)
    lora_fx.swap(tuned, folder, adapter="b")
    os.truncate(folder / "adapter_model.safetensors", 5000)
    with pytest.raises(lora_fx.AdapterFileError, match="cannot be read"):
        lora_fx.swap(tuned, folder, adapter="b")
    shutil.rmtree(folder)
    with pytest.raises(lora_fx.AdapterFileError, match=r"adapter_config\.json"):
        lora_fx.swap(tuned, folder, adapter="b")
    assert has(tuned, state)


def in_place(layer):
    layer.weight.data.add_(1)


def another_parameter(layer):
    layer._parameters["weight"] = nn.Parameter(layer.weight.detach() + 1, requires_grad=False)


def another_memory(layer):
    layer.weight.data = layer.weight.detach() + 1


def larger(layer):
    layer.weight.data = torch.zeros(2 * layer.weight.shape[0], layer.weight.shape[1])


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", [in_place, another_parameter, another_memory, larger])
def test_another_base_is_refused_of_a_file_that_has_been_copied_too(change, tmp_path):
    tuned = two()
    saved(tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    with torch.no_grad():
        change(tuned.blocks[0].k)
    with pytest.raises(lora_fx.AdapterMismatchError):
        lora_fx.swap(tuned, tmp_path, adapter="b")


@pytest.mark.usefixtures("later")
def test_tensors_of_another_dtype_get_the_values_of_a_file_that_has_been_copied_before(tmp_path):
    tuned, state = two(), saved(tmp_path)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    weight = tuned.blocks[0].k.lora_A["b"].weight
    weight.data = torch.zeros_like(weight, dtype=torch.float64)
    lora_fx.swap(tuned, tmp_path, adapter="b")
    assert has(
        tuned, {name: value.to(weight.dtype) if "0.k.lora_A" in name else value for name, value in state.items()}
    )


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("lora", [{"r": 2}, {"alpha": 5.0}], ids=["a lower rank", "another scaling"])
def test_what_is_not_copied_as_it_lies_there_is_read_each_time(lora, reads, tmp_path):
    tuned, again = two(), two()
    saved(tmp_path, **lora)
    for _ in range(2):
        lora_fx.swap(tuned, tmp_path, adapter="b")
    lora_fx.swap(again, tmp_path, adapter="b")
    assert len(reads) == 3
    assert has(tuned, {name.replace(".b.", ".default."): v for name, v in lora_fx.adapter_state(again, "b").items()})


@pytest.mark.usefixtures("later")
def test_few_files_are_kept_and_none_after_a_drop(tmp_path):
    tuned = two()
    for seed in range(keptfile.MOST_FILES + 2):
        saved(tmp_path / str(seed), seed=seed)
        lora_fx.swap(tuned, tmp_path / str(seed), adapter="b")
    kept = tuned.__dict__[KEPT_TARGETS]
    assert len(kept.files) == keptfile.MOST_FILES
    gone = weakref.ref(tuned.blocks[0].k.lora_A["b"].weight)
    del kept
    lora_fx.drop(tuned, "b")
    gc.collect()
    assert gone() is None
