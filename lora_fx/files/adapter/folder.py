"""The folder of an adapter: PEFT's two files of each adapter are replaced together, beside whatever else lies there.

The new ones are written into a hidden folder, which then gets the name that says that they are whole.  From then on
they count, and are moved: no configuration is there until all weights are, so that nobody finds some of
each.  After a kill lora_fx reads what is still in the hidden folder from there, and the next `save` ends the move.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.files.atomic import files_in, locked, place_in, sync_folder, write_synced

_MOVED = ".lora-fx-save"
_LOCK = f"{_MOVED}.lock"


def folder_of(directory: object) -> Path:
    """Return the path of an adapter's folder.

    Raises:
        ValueError: it is no path.
    """
    given = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if not isinstance(given, str):
        raise ValueError(f"the directory of an adapter must be a path, found {type(directory).__name__}")
    return Path(given)


def file_in(folder: Path, *names: str) -> Path:
    """Return where a file of an adapter's folder is: in the hidden one, if a save was killed while it moved it."""
    moved = folder.joinpath(_MOVED, *names)
    if not os.path.lexists(folder / CONFIG_FILE) and os.path.lexists(moved):
        return moved
    return folder.joinpath(*names)


def replace_files(folder: Path, files: Mapping[Path, bytes]) -> None:
    """Write the files of one adapter, or of several in folders in the folder, in place of those that are there.

    Args:
        folder: is made if it is missing; other files in it stay.
        files: contents by path, relative to the folder.

    Raises:
        OSError: nothing has changed, unless a rename itself failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        if place_in(folder, name).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / name))
    with locked(folder / _LOCK, wait=True):
        _end_what_was_killed(folder)
        fresh = Path(tempfile.mkdtemp(prefix=f"{_MOVED}.", dir=folder))
        try:
            for name, content in files.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                write_synced(fresh / name, content)
            for parent in {(fresh / name).parent for name in files} | {fresh}:
                sync_folder(parent)
            os.rename(fresh, folder / _MOVED)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sync_folder(folder)
        _move(folder)


def _end_what_was_killed(folder: Path) -> None:
    """End a move that was begun, and delete what was never whole; a link that bears the name was planted."""
    for left in [*folder.glob(f"{_MOVED}.*"), folder / _MOVED]:
        if left.is_symlink() or left.is_file():
            if left.name != _LOCK:
                left.unlink()
        elif left.name != _MOVED:
            shutil.rmtree(left, ignore_errors=True)
        elif left.is_dir():
            _move(folder)


def _move(folder: Path) -> None:
    """Give the files in the hidden folder their names; a configuration, by which the others are found, comes last.

    What was planted there goes: another file, and a link that would lead a file out of the folder is an OSError.
    """
    moved = folder / _MOVED
    ours = (name for name in files_in(moved) if name.name in (CONFIG_FILE, WEIGHTS_FILE))
    names = sorted(ours, key=lambda name: (name.name == CONFIG_FILE, -len(name.parts), name))
    places = {name: place_in(folder, name) for name in names}
    for name in reversed(names):
        if name.name == CONFIG_FILE:
            places[name].unlink(missing_ok=True)
    sync_folder(folder)
    for name in names:
        os.replace(moved / name, places[name])
        sync_folder(places[name].parent)
    shutil.rmtree(moved, ignore_errors=True)
    sync_folder(folder)
