"""Outputs of frozen blocks in a directory: one safetensors file each, whole or not there."""

import contextlib
import secrets
import time
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from lora_fx.errors import LoraFxWarning
from lora_fx.files.atomic import settle, write_synced
from lora_fx.files.safetensors import read_raw
from lora_fx.files.values import canonical_safetensors
from lora_fx.regions.prefix.digests import digest_of
from lora_fx.regions.prefix.entries import Entry

_NAME = "output"
_PARTS = ".parts"
"""Where files are before they are whole."""
_OLD_SECONDS = 86_400


class Directory:
    """Where entries are kept longer than in memory.  Threads and processes may share it.

    A file that is damaged, or of another origin, is as good as none: it is made again.
    """

    def __init__(self, folder: Path) -> None:
        """Take a folder, which is made if it is missing.

        Raises:
            OSError: there is something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._writes = True
        with contextlib.suppress(OSError):
            self._delete_old_parts()

    def _delete_old_parts(self) -> None:
        """Delete what writers that were killed have left; what lives is not as old."""
        for part in (self._folder / _PARTS).glob("*"):
            if time.time() - part.lstat().st_mtime > _OLD_SECONDS:
                part.unlink(missing_ok=True)

    def _place(self, key: bytes) -> Path:
        return self._folder / key.hex()[:2] / f"{key.hex()}.safetensors"

    def get(self, key: bytes) -> Entry | None:
        """Return what was kept under a key."""
        place = self._place(key)
        if not place.exists():
            return None
        try:
            metadata = read_raw(place).metadata
            with safe_open(place, framework="pt") as file:
                value: torch.Tensor = file.get_tensor(_NAME)
            if digest_of(value).hex() != metadata["bits"]:
                return None
            return Entry(bytes.fromhex(metadata["end"]), value)
        except Exception:  # whatever a damaged file makes of its readers
            return None

    def put(self, key: bytes, entry: Entry) -> None:
        """Keep an entry; a directory that cannot be written to any more is only read from."""
        if not self._writes:
            return
        metadata = {"end": entry.end.hex(), "bits": digest_of(entry.value).hex()}
        try:
            self._write(self._place(key), canonical_safetensors({_NAME: entry.value}, metadata))
        except OSError as error:
            self._writes = False
            text = f"outputs of frozen blocks are kept in memory alone: {self._folder} cannot be written to: {error}"
            warnings.warn(text, LoraFxWarning, stacklevel=2)

    def _write(self, place: Path, content: bytes) -> None:
        """Write a file: whole, or not there."""
        part = self._folder / _PARTS / f"{place.name}.{secrets.token_hex(8)}"
        for folder in (part.parent, place.parent):
            folder.mkdir(exist_ok=True)
        try:
            write_synced(part, content)
            settle(part, place)
        finally:
            part.unlink(missing_ok=True)
