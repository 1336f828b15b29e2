"""The command that kills, fills and faults prints what comes of it and puts it into its page."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

import lora_fx
from tests.support.disasters import Ground, Writer, adapted, killed_at_random, on_full_disk, two_at_once
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


@pytest.mark.parametrize(
    "sections", [["kills"], pytest.param(["long", "threads", "faults", "disks"], marks=pytest.mark.slow)]
)
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
