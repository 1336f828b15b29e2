"""The command that kills, fills and faults prints what comes of it and puts it into its page."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

import lora_fx
from lora_fx.files.checkpoint.outfolder import free_bytes
from tests.support.disasters import (
    Ground,
    Writer,
    adapted,
    killed_at_random,
    on_full_disk,
    read_only,
    two_at_once,
    writers,
)
from tests.support.docpages import ROOT
from tests.support.performance import rows_between

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="forks, and reads Linux's /proc")
PAGE = ROOT / "docs" / "reliability.md"
NAMES = {
    "long": ["long"],
    "threads": ["threads"],
    "faults": ["faults", "edits"],
    "kills": ["kills"],
    "disks": ["disks"],
}


@pytest.fixture(scope="module")
def reliability():
    spec = importlib.util.spec_from_file_location("reliability", ROOT / "benchmarks" / "reliability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("sections", [["kills"], ["long", "threads", "faults", "disks"]])
def test_sections_are_written_into_the_page_and_nothing_is_wrong(tmp_path, reliability, sections):
    page = tmp_path / "page.md"
    shutil.copy(PAGE, page)
    reliability.main(["--quick", "--only", *sections, "--write", str(page)])
    text = page.read_text(encoding="utf-8")
    for name in (name for section in sections for name in NAMES[section]):
        rows = rows_between(text, name)
        assert rows
        assert name == "long" or all(row[-1] == "0" for row in rows), rows
    assert set(reliability.SECTIONS) == set(NAMES)


def test_two_exports_to_one_place_leave_one_of_the_two_and_not_what_was_there_before():
    first, second = adapted(2), adapted(7)
    found = two_at_once(
        Writer(lambda path: lora_fx.export(first, path, "merged"), lambda path: lora_fx.export(second, path, "merged")),
        4,
    )
    assert not found.wrong
    assert found.times["new"] == 4


def test_writers_of_gguf_and_covariances_say_that_the_disk_is_full_or_read_only(tmp_path):
    found = writers(tmp_path, ("gguf",))
    for name in {"export, gguf", "input_covariances"} & found.keys():
        full, closed = on_full_disk(found[name], 5), read_only(found[name])
        assert not full.wrong + closed.wrong, name
        assert full.times["refused"] == 5
        assert closed.times["refused"] == 1


def test_a_part_that_another_merge_has_named_meanwhile_takes_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "gone"])
    assert free_bytes(tmp_path) > 0


def test_what_is_torn_or_lost_is_seen():
    def careless(path):
        path.mkdir(exist_ok=True)
        for name in ("a", "b"):
            with (path / name).open("wb") as file:
                file.write(b"new" * 1000)

    def old(path):
        path.mkdir()
        for name in ("a", "b"):
            (path / name).write_bytes(b"old" * 1000)

    assert on_full_disk(Writer(old, careless), 4).wrong
    ground = Ground(Writer(old, careless))
    ground.prepare()
    (ground.path / "a").write_bytes(b"new" * 1000)
    assert ground.judge("half") == "torn"
    assert ground.close().wrong
    assert killed_at_random(Writer(old, careless), 1).times
