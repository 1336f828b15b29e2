"""Atomic writing: a file is either the old one or the new one, whole."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from lora_fx.errors import AdapterFileError, LoraFxWarning
from lora_fx.files.adapter.describe import Described, describe
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.text import listing
from lora_fx.tuned.build import record_in


def save(tuned: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the model's adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    Equal adapters are written as equal bytes.  Existing files are replaced only when the new ones are complete; other
    files of the directory stay.  Further adapters go into directories of their names.

    Raises:
        RefusedError: the model is not adapted.
        AdapterFileError: the values are on the meta device, or the directory cannot be written.
    """
    folder = Path(directory)
    described = describe_with_values(tuned, folder)
    _warn_of_moved_buffers(tuned)
    files: dict[Path, bytes] = {}
    for each in reversed(described):  # the first, which names the others, comes last
        files |= _files_of(each, folder if each is described[0] else folder / each.name)
    try:
        write_files(files)
    except OSError as error:
        raise AdapterFileError(str(folder), f"cannot be written: {error.strerror or error}") from error


def _warn_of_moved_buffers(tuned: nn.Module) -> None:
    """Running statistics that training has moved belong to no adapter: whoever loads it has those of the base."""
    record = record_in(tuned)
    inside = tuple(f"{path}." for path in record.trained) or ("(none)",)
    outside = [(name, buffer) for name, buffer in tuned.named_buffers() if not name.startswith(inside)]
    moved = [name for name, buffer in outside if name in record.base and not torch.equal(buffer, record.base[name])]
    if moved:
        warnings.warn(
            f"training has changed {listing(moved)}, which the adapter does not hold; "
            "keep them with it by `train:`, or train with those modules in eval mode",
            LoraFxWarning,
            stacklevel=4,
        )


def describe_with_values(tuned: nn.Module, folder: Path) -> list[Described]:
    described = describe(tuned) if not _on_meta(tuned) else []
    if not described:
        raise AdapterFileError(str(folder), "the adapter is on the meta device and has no values to save")
    return described


def _on_meta(tuned: nn.Module) -> bool:
    return any(p.is_meta for name, p in tuned.named_parameters() if ".lora_" in name)


def _files_of(each: Described, folder: Path) -> dict[Path, bytes]:
    config = json.dumps(each.config, indent=2, sort_keys=True) + "\n"
    return {
        folder / WEIGHTS_FILE: canonical_safetensors(each.tensors, each.metadata),
        folder / CONFIG_FILE: config.encode(),
    }


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write all files beside their places first, and move them there only when all are on disk."""
    temporary: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            temporary[path] = _write_beside(path, content)
        for path in files:
            os.replace(temporary[path], path)
            del temporary[path]
    finally:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
    for folder in dict.fromkeys(path.parent for path in files):
        _sync_folder(folder)


def _write_beside(path: Path, content: bytes) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the renames last; where folders cannot be opened (Windows) there is nothing to do."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose bytes depend on the content alone.

    The library writes metadata in the order of a randomly seeded table; the header is rewritten in sorted order,
    which has the same length.
    """
    content = safetensors_bytes(dict(tensors), dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text.rstrip()) != len(content[8 : 8 + length].rstrip()):  # another spelling of the library: leave it
        return content
    return content[:8] + text.ljust(length) + content[8 + length :]
