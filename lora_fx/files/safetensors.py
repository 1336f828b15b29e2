"""The header of a safetensors file, checked: where each byte of each tensor lies.  No torch here."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lora_fx.errors import MergeError
from lora_fx.sources.document import parse_json
from lora_fx.sources.regular import UnreadableError, open_regular

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
_LONGEST_HEADER = 100_000_000
"""The format's own limit."""
_LONGEST_NAME = 1_000
_MOST_AXES, _LARGEST = 16, 1 << 48
"""Beyond any model: what is read later need not fear names, ranks and products of sizes."""


class RawTensor(NamedTuple):
    """One entry of a header; `start` and `end` count bytes from the first byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class RawFile:
    """A safetensors file whose header was read and checked; tensors in the order of their bytes."""

    path: Path
    data_start: int
    size: int
    sha256: str
    """Of the header."""
    tensors: dict[str, RawTensor]
    metadata: dict[str, str]


def read_raw(path: Path) -> RawFile:
    """Return the checked header of a safetensors file; no tensor is read.

    Raises:
        MergeError: the file is missing, cut off, or its header does not describe exactly its bytes.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                _damaged(path, f"a header of {length:,} bytes in a file of {size:,}")
            text = file.read(length)
    except OSError as error:
        raise MergeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnreadableError as error:
        raise MergeError(f"{path}: {error}") from error
    content = _json(path, text)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata is not a table of strings")
    tensors = {name: tensor for _, _, name, tensor in sorted(_tensors(path, content))}
    _check_ranges(path, tensors, size - 8 - length)
    return RawFile(path, 8 + length, size, hashlib.sha256(text).hexdigest(), tensors, metadata)


def _damaged(path: Path, reason: str) -> NoReturn:
    raise MergeError(f"{path}: is not a whole safetensors file", [("header", reason)], "copy it again")


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except UnreadableError as error:
        _damaged(path, str(error))
    if not isinstance(content, dict):
        _damaged(path, "is no JSON object")
    return content


def _tensors(path: Path, content: dict[str, Any]) -> list[tuple[int, int, str, RawTensor]]:
    """Return the entries with where they begin and end, and their names.

    Equal words and shapes are one object, and what was read goes: memory for 100,000 tensors.
    """
    found: list[tuple[int, int, str, RawTensor]] = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for name in [*content]:
        entry = content.pop(name)
        if len(name) > _LONGEST_NAME:
            _damaged(path, f"{name:.80}… has a name of {len(name):,} characters; at most {_LONGEST_NAME:,} are read")
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            bits = BITS[dtype]
        except (KeyError, TypeError, ValueError):
            _damaged(path, f"{name}: {entry!r:.80} describes no tensor")
        # bounds come before products: a shape may hold a thousand numbers of a thousand digits
        numbers = (*shape, start, end)
        if {*map(type, numbers)} != {int} or min(numbers) < 0 or max(numbers) > _LARGEST:
            _damaged(path, f"{name}: sizes and offsets must be whole numbers, not below 0 and not beyond {_LARGEST:,}")
        if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) > _LARGEST:
            _damaged(path, f"{name}: no tensor has a shape of {len(shape)} sizes, {list(shape)!s:.80}")
        if (end - start) * 8 != bits * math.prod(shape):
            _damaged(path, f"{name}: {dtype} {list(shape)} does not take {end - start:,} bytes")
        found.append(
            (start, end, sys.intern(name), RawTensor(sys.intern(dtype), shapes.setdefault(shape, shape), start, end))
        )
    return found


def _check_ranges(path: Path, tensors: Mapping[str, RawTensor], size: int) -> None:
    """The format allows neither gaps nor overlaps: every byte belongs to one tensor."""
    position = 0
    for name, tensor in tensors.items():
        if tensor.start != position:
            _damaged(path, f"{name} begins at byte {tensor.start:,}, not at {position:,}")
        position = tensor.end
    if position != size:
        _damaged(path, f"it describes {position:,} bytes, the file has {size:,}")


def header_bytes(tensors: Iterable[tuple[str, RawTensor]], metadata: Mapping[str, str]) -> bytes:
    """Return length and header of a file with these tensors, padded so that the data begin at a multiple of 8."""
    content: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, tensor in tensors:
        offsets = [tensor.start, tensor.end]
        content[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
