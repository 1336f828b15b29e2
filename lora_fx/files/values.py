"""The values in a safetensors file: their dtypes, a few of them, and bytes that depend on nothing else."""

import itertools
import json
import mmap
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from lora_fx.errors import MergeError, RefusedError
from lora_fx.files.fingerprint import sample_positions
from lora_fx.files.safetensors import BITS, RawFile, RawTensor
from lora_fx.sources.regular import SURROGATE, open_regular

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What can be merged into; everything else is only copied."""
DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
READ = DTYPES | {"C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""What values are read of."""


def read_tensors(file: RawFile) -> dict[str, Tensor]:
    """Return the tensors of a file, in the order of their bytes: views of one map of it, read when they are looked at.

    All dtypes must be in `READ`.

    Raises:
        MergeError, OSError, UnreadableError: the file is another than when its header was read.
    """
    with open_regular(file.path) as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    if len(content) != file.size:
        raise MergeError(f"{file.path}: had {file.size:,} bytes, and has {len(content):,}")
    whole = torch.frombuffer(content, dtype=torch.uint8)
    tensors: dict[str, Tensor] = {}
    for dtype, group in itertools.groupby(file.tensors.items(), lambda item: item[1].dtype):
        entries = dict(group)
        ends = [end for entry in entries.values() for end in entry[2:]]
        first, last = file.data_start + min(ends), file.data_start + max(ends)
        values = whole[first:last] if first % (BITS[dtype] // 8) == 0 else whole[first:last].clone()
        parts = values.view(READ[dtype]).split_with_sizes([entry.elements for entry in entries.values()])
        tensors |= {name: part.view(entry.shape) for (name, entry), part in zip(entries.items(), parts, strict=True)}
    return tensors


def sample(file: RawFile, entry: RawTensor) -> list[float] | None:
    """Return the values of a tensor that `sample_values` looks at; only they are read."""
    if entry.dtype not in FLOATS or not entry.elements:
        return None
    size, first = BITS[entry.dtype] // 8, file.data_start + entry.start
    content = bytearray()
    with file.path.open("rb") as opened:
        for position in sample_positions(entry.elements):
            opened.seek(first + position * size)
            content += opened.read(size)
    return [float(value) for value in torch.frombuffer(content, dtype=FLOATS[entry.dtype]).double()]


def refuse_unwritable(names: Iterable[str]) -> None:
    """Refuse names with half a character (a lone surrogate), which no file can hold.

    Raises:
        RefusedError: with all of them.
    """
    halves = [(name, "holds half a character") for name in names if not name.isascii() and SURROGATE.search(name)]
    if halves:
        raise RefusedError("names that no file can hold; nothing was written", halves, "rename these modules")


def canonical_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file whose bytes depend on the content alone.

    The library writes metadata in the order of a randomly seeded table; the header is rewritten in sorted order,
    which has the same length.

    Raises:
        RefusedError: a name is not text that UTF-8 can hold.
    """
    refuse_unwritable(tensors)
    content = safetensors_bytes(dict(tensors), dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text.rstrip()) != len(content[8 : 8 + length].rstrip()):  # another spelling of the library: leave it
        return content
    return content[:8] + text.ljust(length) + content[8 + length :]
