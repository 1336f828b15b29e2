"""A safetensors file as what it is: a checked header, and ranges of bytes that are read and written piece by piece.

The library reads and writes whole tensors; what streams must know where each byte lies.
"""

from __future__ import annotations

import torch

from lora_fx.files.fingerprint import sample_positions
from lora_fx.files.safetensors import BITS as BITS
from lora_fx.files.safetensors import RawFile as RawFile
from lora_fx.files.safetensors import RawTensor as RawTensor
from lora_fx.files.safetensors import header_bytes as header_bytes
from lora_fx.files.safetensors import read_raw as read_raw

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""What can be merged into; everything else is only copied."""
DTYPES = FLOATS | {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


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
