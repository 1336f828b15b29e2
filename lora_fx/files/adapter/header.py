"""What lora_fx writes beside the tensors of a safetensors file, with a hash over both: a flipped bit is seen."""

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.noted import FORMAT_VERSION, HASH, Header, noted_in


def header_text(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the header as it is written: with the format's version and the hash over content and tensors."""
    numbered = {"format": FORMAT_VERSION, **content}
    return _canonical(numbered | {HASH: hash_of(numbered, tensors)})


def _canonical(content: Mapping[str, Any]) -> str:
    # keys keep their order: the parts of a fused weight lie in the order in which `slices` names them
    return json.dumps(content, separators=(",", ":"))


def hash_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a header's content and over names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(_canonical(content).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        plain = tensor if tensor.device.type == "cpu" and tensor.is_contiguous() else tensor.cpu().contiguous()
        # its memory as it lies: a view of it is an operation of torch, which costs more than the hash of a small factor
        digest.update((ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr()))
    return digest.hexdigest()


def read_header(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Header | None:
    """Return the header of a file, None for a file of PEFT's.

    Raises:
        AdapterFileError: it is damaged, of another format, or not what was written with these tensors.
    """
    noted = noted_in(path, metadata)
    if noted is None:
        return None
    header, content = noted
    written = content.pop(HASH, None)
    _check_hash(path, f"{written!s:.80}", hash_of(content, tensors))
    return header


def _check_hash(path: Path, noted: str, actual: str) -> None:
    if actual != noted:
        facts = [("SHA-256 when written", noted), ("SHA-256 now", actual)]
        advice = "copy it again from where it was written"
        raise AdapterFileError(
            str(path), "is damaged: its contents have changed since they were written", facts, advice
        )
