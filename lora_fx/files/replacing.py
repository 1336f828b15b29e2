"""Files that belong together, replaced together: after a kill anywhere the old ones are there, or the new, or none.

They are written into a hidden folder beside.  Then the old ones are taken away, that by which readers find the others
first, and the new ones get their names, that one last: between the two nothing is found, and never some of each.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lora_fx.files.atomic import files_in, hold, sync_file, sync_folder

_END = ".lora-fx-stage"
_ASIDE = ".replaced"
"""Where the old ones are, in the hidden folder, until the new ones are in place."""


@contextlib.contextmanager
def staged(path: Path, check: Callable[[Path, Path], None]) -> Iterator[Path]:
    """Give a path of the same name in a fresh directory beside; at the end, move all that is in there into place.

    What a run that was killed has left beside the path is put in order first: its hidden folder goes, and what it had
    taken away comes back.

    Args:
        path: of a file or a directory; a directory that is there already goes, with all that is in it.
        check: is given (new, old) for each name that was written, before anything is moved, and raises to refuse.

    Raises:
        OSError: the path cannot be written.
    """
    path = path.resolve() if path.is_dir() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        _clean(path)
    stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_END, dir=path.parent))
    try:
        with _held(stage):
            yield stage / path.name
            written = sorted(stage.iterdir(), key=lambda new: (new.name == path.name, new.name))
            for new in written:
                check(new, path.parent / new.name)
            for name in files_in(stage):
                sync_file(stage / name)
            with _alone_in(path.parent):
                _replace(written, path.parent, stage / _ASIDE)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace(written: Sequence[Path], folder: Path, aside: Path) -> None:
    """Move what was written into a folder; the last is the one by which readers find the others."""
    if len(written) == 1 and not _is_filled(folder / written[0].name):
        _place(written[0], folder / written[0].name)
        return
    aside.mkdir()
    try:
        for new in reversed(written):
            if os.path.lexists(folder / new.name):
                os.rename(folder / new.name, aside / new.name)
        sync_folder(folder)
        for new in written:
            _place(new, folder / new.name)
    except BaseException:
        _bring_back(aside, folder, written[-1].name)
        raise


def _is_filled(old: Path) -> bool:
    return old.is_dir() and any(old.iterdir())


def _place(new: Path, old: Path) -> None:
    """Give a file or a folder its name; into an empty folder that cannot be replaced (a mount) its files are moved."""
    try:
        os.replace(new, old)
    except OSError:
        if not old.is_dir() or _is_filled(old) or new.is_file():
            raise
        for name in sorted(files_in(new)):
            (old / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, old / name)
    sync_folder(old.parent)


def _bring_back(aside: Path, folder: Path, main: str) -> None:
    """Put back what was taken away, by which readers find the others last."""
    for old in sorted(aside.iterdir(), key=lambda old: (old.name == main, old.name)):
        place = folder / old.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(old, place)
    sync_folder(folder)


def _clean(path: Path) -> None:
    """Delete the hidden folders of killed runs that wrote the same path, and bring back what one had taken away."""
    ours = re.compile(re.escape(f".{path.name}.") + "[^.]+" + re.escape(_END))
    with os.scandir(path.parent) as entries:
        stages = [Path(e.path) for e in entries if ours.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    for stage in stages:
        with contextlib.suppress(BlockingIOError), _held(stage) as is_alone:
            if not is_alone:
                continue
            if (stage / _ASIDE).is_dir() and not os.path.lexists(path):
                _bring_back(stage / _ASIDE, path.parent, path.name)
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let no other process move files of exports in a folder meanwhile: it would bring back older ones over ours."""
    if os.name != "posix":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        hold(handle, wait=True)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _held(stage: Path) -> Iterator[bool]:
    """Hold a folder, which shows others that its process lives; give whether that can be known here.

    Raises:
        BlockingIOError: another process holds it.
    """
    if os.name != "posix":
        yield False
        return
    handle = os.open(stage, os.O_RDONLY)
    try:
        yield hold(handle, wait=False)
    finally:
        os.close(handle)
