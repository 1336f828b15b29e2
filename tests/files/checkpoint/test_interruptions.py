"""A streaming merge that is stopped anywhere is continued to the same bytes, in little memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_fx import merge_checkpoint
from lora_fx.errors import MergeError
from lora_fx.files.checkpoint import outfolder, rawbytes, streaming
from tests.support.merging import (
    Q,
    contents,
    factors,
    failing,
    looks_complete,
    weight,
    write_adapter,
    write_base,
)

ROOT = Path(__file__).parents[3]


# -- interruptions


class StopError(Exception):
    pass


def stop_after(calls):
    """Return a progress that ends the merge when it has been told so many things."""
    left = [calls]

    def progress(*_):
        left[0] -= 1
        if left[0] < 0:
            raise StopError

    return progress


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "out_dtype": "float16"}], ids=["plain", "cast"])
def test_merge_stopped_anywhere_is_continued_to_the_same_bytes(tmp_path, sharded, adapter, options):
    told = []
    whole = merge_checkpoint(sharded, adapter, tmp_path / "whole", **options, progress=lambda *step: told.append(step))
    assert len(told) > 5
    for calls in range(len(told)):
        out = tmp_path / f"out{calls}"
        with pytest.raises(StopError):
            merge_checkpoint(sharded, adapter, out, **options, progress=stop_after(calls))
        assert not looks_complete(out)
        assert (out / outfolder.JOURNAL).exists()
        report = merge_checkpoint(sharded, adapter, out, **options)
        assert contents(out) == contents(tmp_path / "whole")
        assert report.tensors == whole.tensors


def test_finished_shards_are_not_written_again(tmp_path, sharded, adapter):
    out, first = tmp_path / "out", "model-00001-of-00002.safetensors"
    size = (sharded / first).stat().st_size

    def stop(done, _, __):
        if done > size:
            raise StopError

    with pytest.raises(StopError):
        merge_checkpoint(sharded, adapter, out, progress=stop)
    before = (out / first).stat().st_mtime_ns
    merge_checkpoint(sharded, adapter, out)
    assert (out / first).stat().st_mtime_ns == before


def test_unfinished_merge_is_continued_by_the_same_inputs_only(tmp_path, sharded, adapter):
    out = tmp_path / "out"
    with pytest.raises(StopError):
        merge_checkpoint(sharded, adapter, out, progress=stop_after(1))
    before = contents(out)
    with pytest.raises(MergeError, match="an unfinished merge of something else") as caught:
        merge_checkpoint(sharded, adapter, out, rounding="stochastic", seed=4)
    assert [key for key, _ in caught.value.problems] == ["rounding", "seed"]
    other = write_adapter(tmp_path / "other", factors(Q, 48, 48))
    with pytest.raises(MergeError, match="adapters"):
        merge_checkpoint(sharded, other, out)
    os.utime(sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(MergeError, match="base"):
        merge_checkpoint(sharded, adapter, out)
    assert contents(out) == before


def test_damaged_journal_is_told(tmp_path, base, adapter):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / outfolder.JOURNAL).write_text('{"shards": {"a": 1}}')
    with pytest.raises(MergeError, match="is damaged"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_carried_file_that_is_deleted_during_the_merge_makes_it_no_checkpoint(tmp_path, sharded, adapter):
    (sharded / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"

    def delete(done, _, __):
        (out / "tokenizer.json").unlink(missing_ok=True)

    with pytest.raises(MergeError, match="somebody has deleted files of the merge"):
        merge_checkpoint(sharded, adapter, out, progress=delete)
    assert not looks_complete(out)
    merge_checkpoint(sharded, adapter, out)
    assert (out / "tokenizer.json").read_text() == "{}"


def test_a_base_that_is_written_during_the_merge_makes_it_no_checkpoint(tmp_path, sharded, adapter):
    first = min(sharded.glob("*.safetensors"))
    with pytest.raises(MergeError, match=f"{first.name} +is another file than when the merge began"):
        merge_checkpoint(sharded, adapter, tmp_path / "out", progress=lambda *_: os.utime(first, ns=(1, 1)))
    assert not looks_complete(tmp_path / "out")


def test_leftovers_of_a_start_that_was_killed_do_not_hinder(tmp_path, base, adapter):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{outfolder.OURS}.x.part").write_text("half")
    merge_checkpoint(base, adapter, out)
    assert looks_complete(out)


def test_two_merges_into_one_directory_do_not_meet(tmp_path, base, adapter):
    (tmp_path / "out").mkdir()
    with outfolder.entered(tmp_path / "out"), pytest.raises(MergeError, match="another process is merging into it"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_second_merge_that_waited_for_the_first_leaves_what_that_has_written(tmp_path, base, adapter, monkeypatch):
    """Between its look at the directory and its lock the other one begins and ends."""
    out, look = tmp_path / "out", streaming.open_journal

    def looked(*args):
        monkeypatch.setattr(streaming, "open_journal", look)
        merge_checkpoint(base, adapter, out)
        return look(*args)

    monkeypatch.setattr(streaming, "open_journal", looked)
    with pytest.raises(MergeError, match="is there already; nothing was written"):
        merge_checkpoint(base, adapter, out, rounding="stochastic")
    merge_checkpoint(base, adapter, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_links_that_bear_names_of_a_merge_are_not_followed(tmp_path, base, adapter):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    for name in ("model.safetensors", "config.json", "tokenizer.json", outfolder.JOURNAL):
        outfolder.part_of(out / name).symlink_to(victim)
    merge_checkpoint(base, adapter, out)
    assert victim.read_text() == "precious"
    merge_checkpoint(base, adapter, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_link_in_place_of_the_lock_is_an_error(tmp_path, base, adapter):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("precious")
    (out / f"{outfolder.OURS}.lock").symlink_to(victim)
    with pytest.raises(MergeError, match="cannot be finished"):
        merge_checkpoint(base, adapter, out)
    assert victim.read_text() == "precious"


def test_folder_that_a_link_leads_out_of_is_not_written_into(tmp_path, base, adapter):
    (base / "assets").mkdir()
    (base / "assets" / "picture").write_text("new")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(StopError):
        merge_checkpoint(base, adapter, out, progress=stop_after(1))
    (out / "assets" / "picture").unlink()
    (out / "assets").rmdir()
    (out / "assets").symlink_to(elsewhere)
    with pytest.raises(MergeError, match="a link leads out of the directory"):
        merge_checkpoint(base, adapter, out)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("threads", [1, 2])
def test_full_disk_is_told_and_the_merge_can_be_continued(tmp_path, sharded, adapter, monkeypatch, threads):
    out = tmp_path / "out"
    torch.set_num_threads(threads)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(MergeError, match="the disk is full") as caught:
            merge_checkpoint(sharded, adapter, out)
    assert "make room and merge again with the same arguments" in str(caught.value)
    assert not looks_complete(out)
    assert not list(out.glob("*.part"))
    merge_checkpoint(sharded, adapter, out)
    merge_checkpoint(sharded, adapter, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_error_while_syncing_is_told(tmp_path, sharded, adapter, monkeypatch):
    monkeypatch.setattr(rawbytes.RawBytes, "sync", failing(errno.EIO))
    with pytest.raises(MergeError, match="cannot be finished: Input/output error"):
        merge_checkpoint(sharded, adapter, tmp_path / "out")
    assert not looks_complete(tmp_path / "out")


def test_too_little_room_is_told_before_anything_is_written(tmp_path, base, adapter, monkeypatch):
    monkeypatch.setattr(streaming, "free_bytes", lambda folder: 1000)
    with pytest.raises(MergeError, match="too little room; nothing was written"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- slow ones


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from lora_fx import merge_checkpoint
from tests.support.merging import contents

base, adapter, whole, out = map(Path, sys.argv[1:])
started = time.perf_counter()
merge_checkpoint(base, adapter, whole, rounding="stochastic")
seconds = time.perf_counter() - started
expected = contents(whole)
chance = random.Random(0)
kills = finished = 0
while kills < 20:
    child = os.fork()
    if child == 0:
        merge_checkpoint(base, adapter, out, rounding="stochastic")
        os._exit(0)
    time.sleep(chance.uniform(0, 0.7 * seconds))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    kills += status == signal.SIGKILL
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if "config.json" in names:
        assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == expected
    if status == 0:
        assert contents(out) == expected
    if "config.json" in names and ".lora-fx-merge.json" not in names:  # a kill may come after all is done
        finished += 1
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
if (out / ".lora-fx-merge.json").exists() or not out.exists() or not any(out.iterdir()):
    merge_checkpoint(base, adapter, out, rounding="stochastic")
assert contents(out) == expected
print(kills, "kills,", finished, "finished between them")
"""


@pytest.mark.slow
def test_merge_killed_at_twenty_random_moments_gives_the_same_bytes(tmp_path):
    shards = [{f"layers.{n}.fc.weight": weight(1024, 2048), f"layers.{n}.norm": weight(1024)} for n in range(12)]
    adapter = {key: tensor for n in range(12) for key, tensor in factors(f"layers.{n}.fc", 1024, 2048).items()}
    paths = write_base(tmp_path / "base", *shards), write_adapter(tmp_path / "adapter", adapter)
    command = [sys.executable, "-c", KILLED, *map(str, paths), str(tmp_path / "whole"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20 kills")


MEMORY = """
import sys
import torch
import lora_fx
torch.set_num_threads(4)  # as many as a merge has workers at most
merge = lora_fx.merge_checkpoint
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key + ":"))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
idle = status("VmRSS")
merge(*sys.argv[1:4], rounding=sys.argv[4])
print(status("VmHWM") - idle)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize(
    ("shape", "rounding"),
    [
        pytest.param((16, 1 << 22), "nearest", id="wide"),
        pytest.param((1 << 12, 1 << 14), "nearest", id="square"),
        pytest.param((1 << 12, 1 << 14), "stochastic", id="square, stochastic"),
        pytest.param((1 << 22, 16), "stochastic", id="high, stochastic"),
    ],
)
def test_memory_stays_below_64_mib_whatever_the_shape(tmp_path, shape, rounding):
    """Twice as much in one tensor; the adapter is half precision, so that its upcast would show."""
    tensors = {"fc.weight": torch.zeros(shape, dtype=torch.bfloat16), "other": torch.zeros(1 << 24, dtype=torch.uint8)}
    adapter = {key: tensor.bfloat16() for key, tensor in factors("fc", *shape, r=1 if 16 in shape else 64).items()}
    base = write_base(tmp_path / "base", tensors)
    folder = write_adapter(tmp_path / "adapter", adapter, r=1 if 16 in shape else 64)
    own = sum(tensor.nbytes for tensor in adapter.values())
    command = [sys.executable, "-c", MEMORY, str(base), str(folder), str(tmp_path / "out"), rounding]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) * 1024 - own <= 64 << 20
