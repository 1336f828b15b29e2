"""A checkpoint directory, looked at: its shards, its configuration, and what else lies there."""

import functools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_fx.errors import MergeError
from lora_fx.files.adapter.names import CONFIG_FILE as ADAPTER_CONFIG
from lora_fx.files.checkpoint.codes import CODES, CodedWeight, CodeSettings, find_codes, settings_of
from lora_fx.files.safetensors import RawFile, RawTensor, read_raw
from lora_fx.sources.document import read_json
from lora_fx.sources.regular import UnreadableError, is_inside, is_regular
from lora_fx.text import listing, shortened

CONFIG = "config.json"
INDEX_END = ".index.json"
_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_NAMED = re.compile(r"(?:.*\.)?(lm_head|embed_tokens|wte|word_embeddings|shared|embed_in|tok_embeddings)\.weight")
"""What token weights are called where no configuration tells the size of the vocabulary."""
_OTHER_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".pte", ".npz",
    ".bin.index.json", ".safetensors.index.json", ".h5.index.json", ".msgpack.index.json", ".ot",
)  # fmt: skip


@dataclass(frozen=True)  # without slots: what is asked of every tensor is kept
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
        """Return the file and the entry of a tensor, None if there is none; of one that is held as codes W's shape."""
        found = next(((file, file.tensors[name]) for file in self.shards.values() if name in file.tensors), None)
        if found is not None or (coded := self.coded(name)) is None:
            return found
        if isinstance(coded, str):
            return next(iter(self.shards.values())), RawTensor(CODES, (0, 0), 0, 0)
        return coded.codes[0], RawTensor(CODES, (coded.rows, coded.columns), 0, 0)

    @functools.cached_property
    def quantised(self) -> tuple[CodeSettings, ...] | str | None:
        """What config.json says of its codes, or why they are not known; None where nothing is quantised."""
        method = next(filter(None, (section.get("quantization_config") for section in self.sections)), None)
        return settings_of(method if isinstance(method, dict) else {"quant_method": method}) if method else None

    @functools.cached_property
    def _coded(self) -> dict[str, CodedWeight | str | None]:
        return {}

    def coded(self, name: str) -> CodedWeight | str | None:
        """Return where the codes of a weight lie, or why nothing can be merged into them; None for a plain one."""
        if not isinstance(self.quantised, tuple):
            return None
        if name not in self._coded:
            self._coded[name] = find_codes(self.shards, self.quantised, name)
        return self._coded[name]

    @property
    def sections(self) -> list[dict[str, Any]]:
        """config.json and the objects in it: those of the parts of a model."""
        return sections_of(self.config or {})

    @functools.cached_property
    def _vocabularies(self) -> frozenset[int]:
        """The sizes of vocabularies that the configuration, or a section of it, tells."""
        return frozenset(_vocabularies(self.config or {}))

    def is_token_weight(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether a weight has a row for each token, as embeddings and output heads have, whatever they are called."""
        sizes = self._vocabularies
        return len(shape) == 2 and (shape[0] in sizes if sizes else _NAMED.fullmatch(key) is not None)

    @functools.cached_property
    def token_weights(self) -> dict[str, tuple[RawFile, RawTensor]]:
        """The token weights that the checkpoint holds, by their keys."""
        located = {key: (file, entry) for file in self.shards.values() for key, entry in file.tensors.items()}
        return {key: where for key, where in located.items() if self.is_token_weight(key, where[1].shape)}

    @functools.cached_property
    def token_names(self) -> str:
        """The first of their keys, for people."""
        return listing(self.token_weights)

    @functools.cached_property
    def token_shapes(self) -> dict[tuple[int, ...], list[tuple[RawFile, RawTensor]]]:
        """The token weights by their shapes."""
        shapes: dict[tuple[int, ...], list[tuple[RawFile, RawTensor]]] = {}
        for where in self.token_weights.values():
            shapes.setdefault(where[1].shape, []).append(where)
        return shapes

    def keys(self) -> Iterator[str]:
        """Yield the names of all tensors, file by file."""
        for file in self.shards.values():
            yield from file.tensors


def _vocabularies(config: dict[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _vocabularies(value)
        elif isinstance(value, int) and (name == "vocab_size" or name.endswith("_vocab_size")) and "type" not in name:
            yield value


def sections_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a configuration and the objects in it."""
    return [config, *(section for section in config.values() if isinstance(section, dict))]


def read_checkpoint(folder: Path) -> BaseCheckpoint:
    """Return what a checkpoint directory holds; only headers are read.

    Raises:
        MergeError: no safetensors checkpoint, damaged files, an index that contradicts them.
    """
    if not folder.is_dir():
        raise MergeError(f"{folder}: not a directory", advice="give the path of a checkpoint's folder, without `hf:`")
    name = _entry(folder)
    index = name if name.endswith(INDEX_END) else None
    placed = {} if index is None else weight_map(folder / index)
    names = [name] if index is None else sorted(set(placed.values()))
    shards = {file: read_raw(folder / file) for file in names}
    _check_placed(folder, placed, shards)
    others = [file for file in _files(folder) if file not in {*names, index, CONFIG}]
    left_out = tuple(file for file in others if file.endswith(_OTHER_WEIGHTS))
    carried = tuple(file for file in others if file not in left_out)
    _refuse_strangers(folder, [*carried, *filter(None, (index, CONFIG if os.path.lexists(folder / CONFIG) else None))])
    config = read_object(folder / CONFIG) if os.path.lexists(folder / CONFIG) else None
    return BaseCheckpoint(folder, shards, index, config, carried, left_out)


def _refuse_strangers(folder: Path, names: Sequence[str]) -> None:
    """Refuse files whose copies would show what lies elsewhere; the cache of Hugging Face is nothing but links."""
    own = Path(os.path.realpath(folder))
    homes = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    places = {name: Path(os.path.realpath(folder / name)) for name in names}
    out = [(name, f"is a link to {to}") for name, to in places.items() if not any(map(to.is_relative_to, homes))]
    out += [(name, "is no file") for name in names if not is_regular(folder / name)]
    if out:
        raise MergeError(f"{folder}: has what is not copied along", out, "take it away, or put a file in its place")


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
        content = read_json(path)
    except UnreadableError as error:
        raise MergeError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise MergeError(f"{path}: is no JSON object")
    if _is_deep(content):
        raise MergeError(f"{path}: is nested more than {_DEEPEST} levels deep")
    return content


_DEEPEST = 50


def _is_deep(content: dict[str, Any]) -> bool:
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        within = (value.values() if isinstance(value, dict) else value for value in level)
        level = [child for values in within for child in values if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def weight_map(path: Path) -> dict[str, str]:
    """Return which file beside an index holds each tensor.

    Raises:
        MergeError: it cannot be read, or names a file that is not beside it.
    """
    index = read_object(path)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise MergeError(f"{path}: has no weight_map")
    for file in placed.values():
        if not isinstance(file, str) or not is_inside(file, ".safetensors"):
            shown = shortened(repr(file)) if isinstance(file, str) else "no name"
            raise MergeError(f"{path}: names {shown}, which is not a safetensors file beside it")
    total = index.get("metadata", {})
    if not isinstance(total, dict) or not isinstance(total.get("total_parameters", 0), int):
        raise MergeError(f"{path}: has a metadata that is no table of sizes")
    return {sys.intern(name): sys.intern(file) for name, file in placed.items()}


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
