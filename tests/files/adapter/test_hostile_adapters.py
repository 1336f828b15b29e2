"""What nobody trains, but anybody can write: refused with the file and the field, before the model is looked at."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterFileError, LoraFxError
from lora_fx.files.adapter import patterns
from lora_fx.files.adapter.contents import contents_of
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE, module_to_save
from lora_fx.files.adapter.patterns import Patterns
from lora_fx.files.adapter.read import read_adapters
from tests.support.merging import PREFIX, factors, write_adapter

A, B = f"{PREFIX}fc.lora_A.weight", f"{PREFIX}fc.lora_B.weight"


def refusal(folder: Path) -> str:
    """Return why an adapter is refused; what `inspect` shows of it is shown, or refused by an error of ours too."""
    with contextlib.suppress(AdapterFileError):
        str(contents_of(folder))
    with pytest.raises(AdapterFileError) as caught:
        read_adapters(folder)
    return str(caught.value)


# -- values


VALUES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "integers": (lambda t: t.to(torch.int64), "is of int64, not of a floating point dtype"),
    "booleans": (lambda t: t.bool(), "is of bool, not of a floating point dtype"),
    "complex numbers": (lambda t: t.to(torch.complex64), "is of complex64, not of a floating point dtype"),
    "too large for float32": (lambda t: t.double() * 0 + 1e39, "has values that are too large for float32"),
    "no numbers": (lambda t: t * float("nan"), "has NaN or infinite values"),
    "none": (lambda t: t[:0], "do not multiply"),
}


@pytest.mark.parametrize(("change", "words"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("key", [A, B], ids=["A", "B"])
def test_factors_that_are_no_floats_of_float32_are_refused(tmp_path, key, change, words):
    tensors = factors("fc", 4, 4)
    assert words in refusal(write_adapter(tmp_path / "a", tensors | {key: change(tensors[key])}))


def test_float64_factors_that_float32_holds_are_read(tmp_path):
    tensors = {name: tensor.double() for name, tensor in factors("fc", 4, 4).items()}
    (file,) = read_adapters(write_adapter(tmp_path / "a", tensors))
    assert file.sites[0].lora_A.dtype == torch.float64


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "alpha beyond float32": ({"lora_alpha": 1e308}, "must be a number that is finite in float32, found 1e+308"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "must be a number that is finite in float32"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "must be a number that is finite in float32, found nan"),
    "alpha of a pattern": ({"alpha_pattern": {"fc": -1e39}}, "alpha_pattern fc"),
    "rank of 64 bits": ({"r": 2**63}, "must be an integer above 0"),
    "rank of a pattern": ({"rank_pattern": {"fc": 10**400}}, "rank_pattern fc"),
    "rows": ({"trainable_token_indices": [2**63]}, "trainable_token_indices"),
    "a version that is a table": ({"peft_version": {"a": 1}}, "peft_version"),
    "half a character": ({"target_modules": ["\ud800"]}, "half a character"),
    "expressions": ({"rank_pattern": {f"(a|b){n}": 1 for n in range(200)}}, "is one of more than 100 expressions"),
    "a long expression": ({"rank_pattern": {"(" * 2000: 1}}, "an expression of 2,000 characters"),
    "names": ({"modules_to_save": [f"m{n}" for n in range(300)]}, "modules_to_save"),
}


@pytest.mark.parametrize(("settings", "words"), SETTINGS.values(), ids=SETTINGS)
def test_setting_that_no_adapter_has_is_refused_by_name(tmp_path, settings, words):
    assert words in refusal(write_adapter(tmp_path / "a", factors("fc", 4, 4), **settings))


def test_integer_of_thousands_of_digits_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "a", factors("fc", 4, 4))
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": ' + "9" * 5000 + "}")
    assert "holds a number of thousands of digits" in refusal(folder)


# -- headers


def headed(folder: Path, header: dict[str, Any] | str, body: bytes = b"") -> Path:
    """Write an adapter with a header of one's own."""
    write_adapter(folder, factors("fc", 4, 4))
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + body)
    return folder


def entry(shape: list[Any], end: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


HEADERS = {
    "0 and 2**63": ({A: entry([0, 2**63])}, "not beyond"),
    "0 and 2**47, twice": ({A: entry([0, 2**47, 2**47])}, "no tensor has a shape of 3 sizes"),
    "many sizes": ({A: entry([1] * 17, 4)}, "no tensor has a shape of 17 sizes"),
    "a size below 0": ({A: entry([-1], 4)}, "not below 0"),
    "4 bits": ({A: entry([2, 4], 4, "F4")}, "is of F4"),
    "scales of 8 bits": ({A: entry([2, 2], 4, "F8_E8M0")}, "is of F8_E8M0"),
    "a long name": ({f"{PREFIX}{'a' * 2000}": entry([1], 4)}, "has a name of 2,017 characters; at most 1,000"),
    "half a character": (f'{{"{PREFIX}\\ud800": {json.dumps(entry([1], 4))}}}', "half a character"),
    "a name twice": (f'{{"a": {json.dumps(entry([1], 4))}, "a": {json.dumps(entry([1], 4))}}}', "twice"),
    "a list": ("[]", "is no JSON object"),
    "deep": ("[" * 5000, "nested too deeply"),
}


@pytest.mark.parametrize(("header", "words"), HEADERS.values(), ids=HEADERS)
def test_header_of_no_adapter_is_refused(tmp_path, header, words):
    assert words in refusal(headed(tmp_path / "a", header, b"\0\0\0\0"))


def test_name_with_nul_is_read_as_any_other(tmp_path):
    (file,) = read_adapters(write_adapter(tmp_path / "a", factors("a\0b", 4, 4)))
    assert file.sites[0].path == "a\0b"


# -- files


ODD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "is a directory, not a file"),
    "a pipe": (os.mkfifo, "is a pipe, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "the link leads nowhere"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read"),
}


@pytest.mark.parametrize(("make", "words"), ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_what_is_no_file_is_not_opened(tmp_path, name, make, words):
    folder = write_adapter(tmp_path / "a", factors("fc", 4, 4))
    (folder / name).unlink()
    make(folder / name)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    "path",
    ["x" * 5000, "a\0b", "/dev/null", "/dev/zero/x", "\ud800"],
    ids=["long", "NUL", "device", "in a device", "half"],
)
def test_path_that_no_adapter_can_have_is_an_error_of_ours(path):
    for use in (lambda: lora_fx.load(nn.Linear(2, 2), path), lambda: contents_of(path)):
        with pytest.raises(LoraFxError):
            use()


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "/dev/null"], ids=["long", "NUL", "device"])
def test_path_that_cannot_be_written_is_an_error_of_ours(path):
    chosen = {"version": 1, "rules": [{"match": {"name": "0"}, "lora": {"r": 1}}]}
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(2, 2)), chosen)
    with pytest.raises(AdapterFileError, match="cannot be written"):
        lora_fx.save(tuned, path)


# -- names and patterns


def in_peft(patterns: dict[str, int], name: str) -> int:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), -1)


def test_patterns_mean_what_they_mean_in_peft_whatever_way_they_are_looked_up():
    draw = random.Random(0)
    words = ["a", "b", "ab", "q_proj", "0", "1", "x-y"]
    joints = [".", r"\.", "."]
    for _ in range(150):
        keys = {}
        for value in range(draw.randint(1, 8)):
            parts = [draw.choice(words) for _ in range(draw.randint(1, 3))]
            key = "".join(part + draw.choice(joints) for part in parts)
            key = draw.choice(("", "", "^")) + key.rstrip(".").rstrip("\\") + draw.choice(("", "", "$"))
            keys[draw.choice((key, key, key, f"({key}|b)", f"{key.rstrip('$')}[01]"))] = value
        table = Patterns(keys)
        assert not table.problems
        names = [
            draw.choice((".", "", "_")).join(draw.choice(words) for _ in range(draw.randint(1, 4))) for _ in range(8)
        ]
        for name in names:
            assert table.value(name, -1) == in_peft(keys, name), (keys, name)
        used = {
            next(key for key in keys if re.match(rf"(.*\.)?({key})$", name))
            for name in names
            if in_peft(keys, name) >= 0
        }
        assert not used & {*table.idle(names)}


def test_module_to_save_is_the_first_path_that_ends_with_a_name():
    assert module_to_save("a.head.b.head.weight", ["b", "head"]) == "a.head"
    assert module_to_save("a.subhead.weight", ["head"]) == "a.subhead"
    assert module_to_save("head", ["head"]) is None
    assert module_to_save("a.head2.weight", ["head"]) is None


# -- size


def timed(folder: Path) -> float:
    """Return how long reading takes, or refusing."""
    start = time.process_time()
    with contextlib.suppress(AdapterFileError):
        read_adapters(folder)
    return time.process_time() - start


DEEP = [("a." * 300)[: 2 * n] + "b" * n for n in range(1, 200)]
SIZES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "many names of targets": (["fc"], {"target_modules": [f"x{n}" for n in range(60_000)]}),
    "many names of parameters": (
        [f"l{n}" for n in range(500)],
        {"target_parameters": [f"x{n}.w" for n in range(30_000)]},
    ),
    "many ranks": ([f"l{n}" for n in range(500)], {"rank_pattern": {f"x{n}": 1 for n in range(20_000)}}),
    "ranks of many forms": (DEEP, {"rank_pattern": {name.replace("a", "b", n): 1 for n, name in enumerate(DEEP)}}),
    "many modules": ([f"l{n}" for n in range(500)], {"modules_to_save": [f"m{n}" for n in range(256)]}),
    "an expression of targets": (["fc"], {"target_modules": "(a|" * 20_000}),
}


@pytest.mark.parametrize(("names", "settings"), SIZES.values(), ids=SIZES)
def test_time_follows_the_size(tmp_path, names, settings):
    tensors = {key: tensor for name in names for key, tensor in factors(name, 1, 1, 1).items()}
    assert timed(write_adapter(tmp_path / "a", tensors, **{"r": 1, **settings})) < 2


def test_header_of_a_megabyte_with_sizes_of_thousands_of_digits_is_refused_at_once(tmp_path):
    header = f'{{"{A}": {{"dtype": "F32", "shape": [{", ".join(["1" + "0" * 4000] * 250)}], "data_offsets": [0, 4]}}}}'
    folder = headed(tmp_path / "a", header, b"\0\0\0\0")
    assert timed(folder) < 2


def test_patterns_that_take_too_long_are_refused(tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a", factors("fc", 4, 4), rank_pattern={"(fc|x)": 4})
    assert read_adapters(folder)
    monkeypatch.setattr(patterns, "_SECONDS", 0)
    monkeypatch.setattr(patterns, "_SECONDS_PER_NAME", 0)
    assert "has patterns that take too long to match" in refusal(folder)
