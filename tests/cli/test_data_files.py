"""--data: files of inputs on the command line."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_fx.cli.models import data
from lora_fx.cli.models.data import batches_of
from lora_fx.cli.models.pretrained import ModelSpecError
from lora_fx.errors import MergeError
from lora_fx.files.safetensors import read_raw


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of arguments of several dtypes, ten rows of each."""
    arguments = {"ids": torch.arange(30).view(10, 3), "mask": torch.ones(10, 3, dtype=torch.bool)}
    save_file(arguments | {"x": torch.randn(10, 2).bfloat16()}, tmp_path / "rows.safetensors")
    return tmp_path / "rows.safetensors"


def test_rows_of_a_file_become_batches_of_all_arguments(file: Path):
    batches = batches_of(str(file))
    assert [len(batch["ids"]) for batch in batches] == [2] * 5
    assert all(list(map(len, batch.values())) == [2] * 3 for batch in batches)
    assert torch.equal(torch.cat([batch["ids"] for batch in batches]), torch.arange(30).view(10, 3))
    assert {name: value.dtype for name, value in batches[0].items()} == {
        "ids": torch.int64, "mask": torch.bool, "x": torch.bfloat16,
    }  # fmt: skip


def test_header_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(data, "read_raw", lambda path: read.append(path) or read_raw(path))
    monkeypatch.setattr("safetensors.safe_open", lambda *_, **__: pytest.fail("the file is opened by the library too"))
    batches_of(str(file))
    assert read == [file]


def test_batches_are_as_they_were_read_whatever_becomes_of_the_file(file: Path):
    batches = batches_of(str(file))
    with builtins.open(file, "r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert torch.equal(torch.cat([batch["ids"] for batch in batches]), torch.arange(30).view(10, 3))


def test_dtype_that_no_input_has_is_an_error_that_names_it(tmp_path: Path):
    path = tmp_path / "odd.safetensors"
    save_file({"x": torch.zeros(4, 2), "scale": torch.zeros(4, 2, dtype=torch.uint16)}, path)
    with pytest.raises(ModelSpecError, match=r"odd\.safetensors: scale is of U16, of which torch makes no inputs"):
        batches_of(str(path))


def test_file_that_is_cut_off_is_an_error(file: Path):
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(MergeError, match="is not a whole safetensors file"):
        batches_of(str(file))


def test_file_that_goes_while_it_is_read_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch):
    raw = read_raw(file)
    monkeypatch.setattr(data, "read_raw", lambda _: raw)
    file.unlink()
    with pytest.raises(ModelSpecError, match="cannot be read"):
        batches_of(str(file))
