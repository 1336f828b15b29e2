"""A checkpoint directory, looked at: its shards, its configuration, and what else lies there."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.errors import MergeError
from lora_fx.files.adapter.names import CONFIG_FILE as ADAPTER_CONFIG
from lora_fx.files.safetensors import RawFile, RawTensor, read_raw
from lora_fx.text import listing

CONFIG = "config.json"
INDEX_END = ".index.json"
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".pte", ".npz",
    ".bin.index.json", ".safetensors.index.json", ".h5.index.json", ".msgpack.index.json", ".ot",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A checkpoint of one or several safetensors files."""

    folder: Path
    shards: dict[str, RawFile]
    """By file name, in the order of the names."""
    index: str | None
    """Name of the index; None for a single file."""
    config: dict[str, Any] | None
    carried: tuple[str, ...]
    """Other files that belong to it: tokenizer, generation settings and the like, relative."""
    left_out: tuple[str, ...]
    """Files that hold weights in another form; they would be the unmerged ones."""

    def find(self, name: str) -> tuple[RawFile, RawTensor] | None:
        """Return the file and the entry of a tensor, None if there is none."""
        return next(((file, file.tensors[name]) for file in self.shards.values() if name in file.tensors), None)

    @property
    def sections(self) -> list[dict[str, Any]]:
        """config.json and the objects in it: those of the parts of a model."""
        return sections_of(self.config or {})

    def keys(self) -> Iterator[str]:
        """Yield the names of all tensors, file by file."""
        for file in self.shards.values():
            yield from file.tensors


def sections_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and the objects in it."""
    return [config, *(section for section in config.values() if isinstance(section, dict))]


def read_checkpoint(folder: Path) -> BaseCheckpoint:
    """Return what a checkpoint directory holds; only headers are read.

    Raises:
        MergeError: no safetensors checkpoint, damaged files, an index that contradicts them.
    """
    if not folder.is_dir():
        raise MergeError(f"{folder}: not a directory")
    name = _entry(folder)
    index = name if name.endswith(INDEX_END) else None
    placed = {} if index is None else _weight_map(folder / index)
    names = [name] if index is None else sorted(set(placed.values()))
    shards = {file: read_raw(folder / file) for file in names}
    _check_placed(folder, placed, shards)
    others = [file for file in _files(folder) if file not in {*names, index, CONFIG}]
    left_out = tuple(file for file in others if file.endswith(_OTHER_WEIGHTS))
    carried = tuple(file for file in others if file not in left_out)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return BaseCheckpoint(folder, shards, index, config, carried, left_out)


def _entry(folder: Path) -> str:
    """Return the name of the single file, or of the index."""
    known = [end for name in _NAMES for end in (name, name + INDEX_END) if (folder / end).is_file()]
    if len(known) == 1:
        return known[0]
    if known:
        raise MergeError(f"{folder}: which checkpoint is meant?", [(file, "is there") for file in known])
    weights = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth", ".gguf"))
    advice = f"it has {listing(weights)}" if weights else ""
    raise MergeError(f"{folder}: has no {_NAMES[0]} and no {_NAMES[0]}{INDEX_END}", advice=advice)


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file.

    Raises:
        MergeError: it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path}: is no JSON object")
    return content


def _weight_map(path: Path) -> dict[str, str]:
    placed = read_object(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise MergeError(f"{path}: has no weight_map")
    for file in set(map(str, placed.values())):
        if Path(file).name != file or file.startswith(".") or not file.endswith(".safetensors"):
            raise MergeError(f"{path}: names {file!r}, which is not a safetensors file beside it")
    return {sys.intern(name): sys.intern(str(file)) for name, file in placed.items()}


def _check_placed(folder: Path, placed: dict[str, str], shards: dict[str, RawFile]) -> None:
    lost = [(name, f"is not in {file}") for name, file in placed.items() if name not in shards[file].tensors]
    if lost:
        raise MergeError(f"{folder}: the index contradicts the files", lost[:20])
    seen: set[str] = set()
    for file in shards.values():
        double = seen & file.tensors.keys()
        if double:
            raise MergeError(f"{folder}: tensors in two files", [(name, file.path.name) for name in sorted(double)])
        seen |= file.tensors.keys()


def _files(folder: Path) -> Iterator[str]:
    """Yield the visible files, folders in folders included; an adapter's configuration would be loaded as one."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(child for child in folders if not child.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and name != ADAPTER_CONFIG:
                yield str((Path(parent) / name).relative_to(folder))
