"""Weights that a checkpoint of compressed-tensors holds as integers: where their codes, scales and zeros lie.

Known are `pack-quantized` (codes of 4 or 8 bits, packed into int32) and `int-quantized` (int8), with one scale for a
group of a row, a row, or all, as llm-compressor and transformers write them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.files.safetensors import RawFile, RawTensor

Located = tuple[RawFile, RawTensor]
CODES = "codes"
"""What stands for the dtype of a weight [out, in] that no tensor of the checkpoint holds as it is."""
_SCALES = ("F16", "BF16", "F32")
_PACKED_BITS, _WORD = (4, 8), 32


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight [rows, columns] = (codes - zero) · scale, where its parts lie."""

    key: str
    """Of the tensor with the codes."""
    codes: Located
    scale: Located
    zero: Located | None
    rows: int
    columns: int
    bits: int
    packed: bool
    """Whether several codes share a word of 32 bits."""


@dataclass(frozen=True, slots=True)
class CodeSettings:
    """What `quantization_config` says of the layers of one group."""

    bits: int
    format: str
    symmetric: bool


def settings_of(method: Mapping[str, Any]) -> tuple[CodeSettings, ...] | str:
    """Return the settings of a `quantization_config`, or why such a checkpoint is not merged into."""
    name = method.get("quant_method", "?")
    if name != "compressed-tensors":
        return f"quant_method {name!s:.60}"
    if (status := method.get("quantization_status")) != "compressed":
        return f"quantization_status {status!s:.60}"
    rotated = [key for key in ("sparsity_config", "transform_config") if (method.get(key) or {}).get("config_groups")]
    rotated += ["sparsity_config"] if (method.get("sparsity_config") or {}).get("format", "dense") != "dense" else []
    if rotated:
        return f"{rotated[0]} changes what its weights are"
    groups, found = method.get("config_groups"), []
    if not isinstance(groups, Mapping):
        return "no config_groups"
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("type") == "int" and isinstance(weights.get("num_bits"), int):
            form = str(group.get("format") or method.get("format"))
            found.append(CodeSettings(weights["num_bits"], form, bool(weights.get("symmetric", True))))
    return tuple(found)


def find_codes(shards: Mapping[str, RawFile], settings: Sequence[CodeSettings], name: str) -> CodedWeight | str | None:
    """Return where the codes of a weight lie, or why they cannot be merged into; None for one that is held plain."""
    stem = name.removesuffix(".weight")
    parts = {
        end: (file, file.tensors[key])
        for end in ("packed", "scale", "zero_point", "shape", "g_idx", "global_scale")
        for file in shards.values()
        if (key := f"{stem}.weight_{end}") in file.tensors
    }
    whole = next(((file, file.tensors[name]) for file in shards.values() if name in file.tensors), None)
    codes, packed = parts.get("packed", whole), "packed" in parts
    if stem == name or codes is None or (not packed and (codes[1].dtype in (*_SCALES, "F64") or "scale" not in parts)):
        return None
    kind = codes[1].dtype
    if kind != ("I32" if packed else "I8"):
        return f"is stored as {kind}: codes that are no integers cannot be merged into here"
    if odd := [end for end in ("g_idx", "global_scale") if end in parts]:
        return f"has a weight_{odd[0]}, which is not known here"
    return _known(f"{stem}.weight_packed" if packed else name, parts, codes, settings)


def _known(
    key: str, parts: Mapping[str, Located], codes: Located, settings: Sequence[CodeSettings]
) -> CodedWeight | str:
    packed, scale, zero = "packed" in parts, parts.get("scale"), parts.get("zero_point")
    shape = _numbers(parts.get("shape")) if packed else codes[1].shape
    if shape is None or len(shape) != 2 or scale is None or scale[1].dtype not in _SCALES:
        return "does not tell its shape and scales"
    rows, columns = shape
    fitting = [
        one
        for one in settings
        if one.format == ("pack-quantized" if packed else "int-quantized")
        and (not packed or (one.bits in _PACKED_BITS and codes[1].shape == (rows, -(-columns * one.bits // _WORD))))
        and one.symmetric == (zero is None)
    ]
    if len({one.bits for one in fitting}) != 1:
        return "has codes of a kind that config.json does not tell, or that is not known here"
    bits = fitting[0].bits
    parts_of_row = scale[1].shape[1] if len(scale[1].shape) == 2 and scale[1].elements > 1 else 1
    if scale[1].elements not in (1, rows * parts_of_row) or not parts_of_row or columns % parts_of_row:
        return "has scales of blocks; known are those of groups of a row, of rows, and of all"
    if zero is not None and zero[1].dtype == "I32":
        held = (-(-rows * bits // _WORD), parts_of_row)
        if zero[1].shape != held or _WORD % bits:
            return "has zeros of another shape than its scales"
    elif zero is not None and (zero[1].dtype != "I8" or zero[1].elements != scale[1].elements):
        return "has zeros of another kind than is known here"
    return CodedWeight(key, codes, scale, zero, rows, columns, bits, packed)


def _numbers(located: Located | None) -> tuple[int, ...] | None:
    """Return the whole numbers that a small tensor holds."""
    if located is None or located[1].dtype not in ("I64", "I32") or located[1].elements > 8:
        return None
    file, entry = located
    size = (entry.end - entry.start) // max(1, entry.elements)
    with file.path.open("rb") as opened:
        opened.seek(file.data_start + entry.start)
        content = opened.read(entry.end - entry.start)
    starts = range(0, len(content), max(1, size))
    return tuple(int.from_bytes(content[at : at + size], "little", signed=True) for at in starts)
