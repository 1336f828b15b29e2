"""Each writer is killed before each of its steps: what is there then is the old or the new, or nothing, never both."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterFileError, ExportError
from lora_fx.files.adapter.folder import file_in
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.files.adapter.read import read_adapters
from lora_fx.files.checkpoint.outfolder import JOURNAL
from lora_fx.files.prefixes import Directory
from lora_fx.files.replacing import staged
from lora_fx.regions.prefix.entries import Entry
from tests.support.killing import killed_before, kills
from tests.support.merging import Q, base_tensors, contents, factors, write_adapter, write_base

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of this process")
PAIR = (CONFIG_FILE, WEIGHTS_FILE)


def adapted(alpha, seed, adapters=("default",)):
    """Return a model whose adapters have the same shapes whatever the alpha: weights and scalings could be mixed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    rules = [
        {"match": {"name": str(n)}, "lora": {"r": 2, "alpha": alpha, "init": "random", "adapter": name}}
        for n, name in enumerate(adapters)
    ]
    tuned = lora_fx.apply(model, {"version": 1, "rules": rules})
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.copy_(torch.randn_like(parameter))
    return tuned


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of an adapter's folder, and of those in it, that PEFT would look at."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".")}


def pairs(held: dict[str, bytes]) -> dict[str, tuple[bytes, bytes]]:
    """Return configuration and weights by folder, where both are there."""
    folders = {str(Path(name).parent) for name in held}
    keys = {folder: [str(Path(folder) / name) for name in PAIR] for folder in folders}
    return {folder: (held[a], held[b]) for folder, (a, b) in keys.items() if a in held and b in held}


def read(folder: Path) -> list[dict[str, torch.Tensor]] | None:
    """Return what lora_fx reads there, with the scalings; None where it refuses."""
    try:
        return [
            {site.stem: torch.cat([site.lora_A.flatten(), site.lora_B.flatten(), torch.tensor([site.lora.scaling])])}
            for file in read_adapters(folder)
            for site in file.sites
        ]
    except AdapterFileError:
        return None


def same(a, b):
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


SOME, EVERY = 12, pytest.param(1, marks=pytest.mark.slow)
"""How many steps lie between two kills."""
SAVES = [
    pytest.param(("default",), SOME, id="some"),
    pytest.param(("default",), 1, id="every", marks=pytest.mark.slow),
    pytest.param(("default", "other"), 3, id="every third-two adapters", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("adapters", "every"), SAVES)
@pytest.mark.parametrize("there", ["nothing", "an adapter", "a save that was killed"])
def test_save_killed_before_any_step_leaves_the_old_adapter_or_the_new_one(tmp_path, there, adapters, every):
    old, new, folder = adapted(2, 1, adapters), adapted(7, 2, adapters), tmp_path / "adapter"
    for name, tuned in (("old", old), ("new", new)):
        lora_fx.save(tuned, tmp_path / name)
    expected = [files(tmp_path / name) for name in ("old", "new")]
    known = [read(tmp_path / name) for name in ("old", "new")]

    def before():
        shutil.rmtree(folder, ignore_errors=True)
        if there != "nothing":
            lora_fx.save(old, folder)
            (folder / "optimizer.pt").write_bytes(b"of somebody else")
        if there == "a save that was killed":
            assert killed_before(15, lambda: lora_fx.save(new, folder))

    seen = []
    for _ in kills(lambda: lora_fx.save(new, folder), before, every):
        left = files(folder) if folder.exists() else {}
        for place, pair in pairs(left).items():
            assert pair in [pairs(whole)[place] for whole in expected]
        now = read(folder)
        assert now is None or any(same(now, adapter) for adapter in known)
        seen.append("none" if now is None else "old" if same(now, known[0]) else "new")
        if there != "nothing":
            assert now is not None
            assert left["optimizer.pt"] == b"of somebody else"
            lora_fx.save(new, folder)
            assert files(folder) == expected[1] | {"optimizer.pt": b"of somebody else"}
            assert not [name for name in contents(folder) if name.startswith(".")]
    assert len(seen) >= 20 // every
    assert seen == sorted(seen, key=["none", "old", "new"].index)
    assert every > 1 or {"new"} < {*seen} or there == "a save that was killed"


def test_what_a_killed_save_has_moved_away_counts_only_where_no_configuration_is(tmp_path):
    lora_fx.save(adapted(2, 1), tmp_path)
    (tmp_path / ".lora-fx-save").mkdir()
    (tmp_path / ".lora-fx-save" / WEIGHTS_FILE).write_bytes(b"of somebody else")
    assert file_in(tmp_path, WEIGHTS_FILE) == tmp_path / WEIGHTS_FILE


def test_save_follows_no_link_that_bears_a_name_of_its_own(tmp_path):
    folder, victim = tmp_path / "adapter", tmp_path / "victim"
    folder.mkdir()
    victim.mkdir()
    (victim / "file").write_text("precious")
    (folder / ".lora-fx-save").symlink_to(victim)
    lora_fx.save(adapted(2, 1), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(PAIR)
    (folder / ".lora-fx-save.lock").symlink_to(victim / "file")
    with pytest.raises(AdapterFileError, match="cannot be written"):
        lora_fx.save(adapted(2, 1), folder)
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("planted", [True, False], ids=["hidden folder", "adapter's own folder"])
def test_save_writes_nothing_where_a_link_leads_out_of_the_folder(tmp_path, planted):
    folder, elsewhere = tmp_path / "adapter", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (folder / "other").symlink_to(elsewhere)
    if planted:
        (folder / ".lora-fx-save" / "other").mkdir(parents=True)
        (folder / ".lora-fx-save" / "other" / CONFIG_FILE).write_text("of somebody else")
    with pytest.raises(AdapterFileError, match="a link leads out"):
        lora_fx.save(adapted(2, 1, ["default"] if planted else ["default", "other"]), folder)
    assert not list(elsewhere.iterdir())


def test_save_takes_nothing_but_adapters_from_what_a_killed_save_has_left(tmp_path):
    (tmp_path / ".lora-fx-save").mkdir()
    (tmp_path / ".lora-fx-save" / "notes.txt").write_text("of somebody else")
    (tmp_path / "notes.txt").write_text("precious")
    lora_fx.save(adapted(2, 1), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*PAIR, "notes.txt"])


# -- exports


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800", "circle"], ids=["long", "NUL", "half", "circle"])
def test_paths_that_no_export_can_have_are_refused(tmp_path, path):
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(ExportError):
        lora_fx.export(adapted(2, 1), tmp_path / path, "merged")
    assert [left.name for left in tmp_path.iterdir()] == ["circle"]


def accept(new: Path, old: Path) -> None:
    pass


def written(path: Path, text: str, form: str) -> None:
    """Write as an export does: a file, several of which the first names the others, or a directory of two."""
    with staged(path, accept) as stage:
        if form == "directory":
            stage.mkdir()
            (stage / "config.json").write_text(text)
            (stage / "weights").write_text(text)
        else:
            stage.write_text(text)
        if form == "several files":
            stage.with_name("data").write_text(text)


def together(path: Path, form: str) -> list[Path]:
    """Return the files that a reader reads together: none where the first is not there."""
    if form == "directory":
        return [path / "config.json", path / "weights"] if path.exists() else []
    return [file for file in (path, path.with_name("data")) if file.exists()] if path.exists() else []


@pytest.mark.parametrize("every", [5, EVERY])
@pytest.mark.parametrize("form", ["file", "several files", "directory"])
@pytest.mark.parametrize("there", ["nothing", "an export"])
def test_export_killed_before_any_step_leaves_the_old_files_or_the_new_ones(tmp_path, there, form, every):
    folder = tmp_path / "out"
    path = folder / "model"

    def before():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if there == "an export":
            written(path, "old", form)

    seen = []
    for step in kills(lambda: written(path, "new", form), before, every):
        texts = [file.read_text() for file in together(path, form)]
        assert len({*texts}) <= 1
        assert len(texts) in (0, 1 if form == "file" else 2)
        seen += texts[:1]
        if step % 2:  # the next run ends well, and nothing hidden stays
            written(path, "new", form)
        else:  # a run that fails brings back what was taken away
            with pytest.raises(ZeroDivisionError), staged(path, accept):
                raise ZeroDivisionError
            assert together(path, form) or there == "nothing"
        assert len({file.read_text() for file in together(path, form)}) <= 1
        assert not [name for name in os.listdir(folder) if name.startswith(".")]
    assert every > 1 or form == "file" or {*seen} >= ({"old", "new"} if there == "an export" else {"new"})


def test_export_leaves_the_hidden_folder_of_a_run_that_lives(tmp_path):
    with staged(tmp_path / "model", accept) as stage:
        stage.write_text("first")
        written(tmp_path / "model", "second", "file")
        assert stage.exists()
    assert (tmp_path / "model").read_text() == "first"


@pytest.mark.slow
def test_adapter_export_killed_before_any_step_is_whole_or_not_there(tmp_path):
    path = tmp_path / "adapter"
    whole = {}
    for name, alpha in (("old", 2), ("new", 7)):
        lora_fx.export(adapted(alpha, alpha), tmp_path / name, "peft")
        whole[name] = files(tmp_path / name)

    def before():
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "old", path)

    left = [
        files(path) if path.exists() else {} for _ in kills(lambda: lora_fx.export(adapted(7, 7), path, "peft"), before)
    ]
    assert all(state in ({}, *whole.values()) for state in left)
    assert whole["old"] in left
    assert {} in left


# -- a merge of files


@pytest.mark.parametrize("every", [SOME, EVERY])
def test_merge_killed_before_any_step_is_continued_to_the_same_bytes(tmp_path, every):
    tensors = base_tensors()
    head = {name: tensors.pop(name) for name in (f"{Q}.weight", "steps")}
    base, adapter = (
        write_base(tmp_path / "base", head, tensors),
        write_adapter(tmp_path / "adapter", factors(Q, 48, 48)),
    )
    lora_fx.merge_checkpoint(base, adapter, tmp_path / "whole")
    expected, out = contents(tmp_path / "whole"), tmp_path / "out"

    def work():
        lora_fx.merge_checkpoint(base, adapter, out)

    steps = 0
    for _ in kills(work, lambda: shutil.rmtree(out, ignore_errors=True), every):
        steps += 1
        visible = files(out) if out.exists() else {}
        assert all(expected[name] == data for name, data in visible.items())
        assert visible == expected or "config.json" not in visible or (out / JOURNAL).exists()
        if set(visible) != set(expected) or (out / JOURNAL).exists():
            work()
        assert files(out) == expected
    assert steps >= 30 // every


# -- outputs that `cached_prefix` keeps


def test_an_output_that_is_kept_is_whole_or_not_there_wherever_its_writer_is_killed(tmp_path):
    folder, key, entry = tmp_path / "kept", b"key", Entry(b"end", torch.arange(6.0))

    def seen():
        found = Directory(folder).get(key)
        assert found is None or (found.end == entry.end and torch.equal(found.value, entry.value))
        return found is not None

    states = [seen() for _ in kills(lambda: Directory(folder).put(key, entry), lambda: shutil.rmtree(folder, True))]
    assert states == sorted(states)
    assert len({*states}) == 2
    shutil.rmtree(folder)
    assert killed_before(4, lambda: Directory(folder).put(key, entry))
    (left,) = (path for path in folder.rglob("*") if path.is_file())
    Directory(folder)
    assert left.exists()  # its writer may live
    os.utime(left, (0, 0))
    Directory(folder).put(key, entry)
    assert [path for path in folder.rglob("*") if path.is_file()] == [
        folder / key.hex()[:2] / f"{key.hex()}.safetensors"
    ]


# -- PEFT


@pytest.mark.slow
def test_peft_finds_the_old_adapter_or_the_new_one_or_none_wherever_save_is_killed(tmp_path):
    peft = pytest.importorskip("peft")
    old, new, folder = adapted(2, 1), adapted(7, 2), tmp_path / "adapter"
    base, x = lora_fx.remove(old), torch.randn(3, 4)
    outputs = {"old": old.eval()(x), "new": new.eval()(x)}

    def before():
        shutil.rmtree(folder, ignore_errors=True)
        lora_fx.save(old, folder)

    seen = set()
    for _ in kills(lambda: lora_fx.save(new, folder), before):
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
        except (ValueError, OSError):  # it looks for them elsewhere
            seen.add("none")
            continue
        seen.add(next(name for name, output in outputs.items() if torch.allclose(output, theirs, atol=1e-5)))
    assert seen == {"old", "none", "new"}
