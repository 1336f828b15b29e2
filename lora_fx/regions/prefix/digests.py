"""Digests of everything that the output of a frozen block is a function of: inputs, weights, code, and kernels."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.tensors import attribute_at
from lora_fx.regions.program import Program

_SIZE = 20
_CHUNKS = 256
"""How many sums are taken of a weight's bits."""


class NoDigest(Exception):
    """Something has no bytes that could be compared; the text says what.  An outcome, not an error."""


def digest(*parts: bytes | str) -> bytes:
    """Return one digest of several texts and digests, of which none can run into the next."""
    made = hashlib.blake2b(digest_size=_SIZE)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        made.update(len(content).to_bytes(8, "little"))
        made.update(content)
    return made.digest()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory with values, and nothing else."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not (tensor.is_meta or tensor.is_inference() or tensor.is_quantized)


def _content(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, in the order of its entries."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest_of(tensor: Tensor) -> bytes:
    """Return the digest of dtype, shape, strides and bits of a plain tensor."""
    return digest(_facts(tensor, tensor.shape, tensor.stride()), _content(tensor).tobytes())


def digests_of_rows(tensor: Tensor) -> list[bytes]:
    """Return for each index of the first dimension the digest of what lies there; how many there are is in none."""
    facts = _facts(tensor, tensor.shape[1:], tensor.stride()[1:])
    if tensor.stride(0) == 0:
        return [digest(facts, _content(tensor[:1]).tobytes())] * len(tensor)
    content = _content(tensor)
    size = len(content) // len(tensor)
    return [digest(facts, content[size * row : size * (row + 1)].tobytes()) for row in range(len(tensor))]


def _facts(tensor: Tensor, shape: Iterable[int], strides: Iterable[int]) -> str:
    return repr((str(tensor.dtype), str(tensor.device), tuple(shape), tuple(strides)))


def digest_of_kernels(devices: Iterable[torch.device]) -> bytes:
    """Return the digest of what decides on kernels and their order of sums: torch, threads, switches, autocast."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    kinds = sorted({device.type for device in devices} | {"cpu"})
    cast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds if _casts(kind)]
    names = [torch.cuda.get_device_name(device) for device in devices if device.type == "cuda"]
    switches = (
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        [getattr(part, "fp32_precision", None) for part in (cuda.matmul, cudnn, torch.backends.mkldnn)],
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.backends.mkldnn.enabled,
        torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    return digest(repr((torch.__version__, torch.get_num_threads(), torch.is_grad_enabled(), cast, names, switches)))


def _casts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


@dataclass(slots=True)
class Owned:
    """The digest of what a block owns, made again as soon as something of it is another tensor or has other bits.

    That costs one reading of the weights at each call.  Writes that torch counts would not need it; but those through
    `weight.data` are not counted.
    """

    _known: tuple[tuple[Any, ...], bytes, bytes] = ((), b"", b"")
    """Which tensors, the sums of their bits, and the digest; in one, since threads may ask."""

    def digest(self, block: nn.Module, program: Program) -> bytes:
        """Return it.

        Raises:
            NoDigest: the block owns something that is no plain tensor.
        """
        tensors = dict(_owned(block, program))
        odd = next((name for name, tensor in tensors.items() if not is_plain(tensor)), None)
        if odd is not None:
            raise NoDigest(f"{odd} is no plain tensor")
        facts = tuple((name, id(t), t.data_ptr(), t._version, t.dtype, t.shape) for name, t in tensors.items())
        sums = _sums_of(list(tensors.values()))
        if (facts, sums) == self._known[:2]:
            return self._known[2]
        made = digest(*(part for name, t in tensors.items() for part in (name, digest_of(t))))
        self._known = (facts, sums, made)
        return made


def _owned(block: nn.Module, program: Program) -> Iterable[tuple[str, Tensor]]:
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)
    for name in program.captured.owned:
        yield name, attribute_at(block, name)


def _sums_of(tensors: list[Tensor]) -> bytes:
    """Return sums over the bits of some tensors, a few hundred of each: any entry that changes changes one."""
    sums = [part.cpu() for device in {t.device for t in tensors} for part in _on(device, tensors)]
    return b"".join(part.numpy().tobytes() for part in sums)


def _on(device: torch.device, tensors: list[Tensor]) -> list[Tensor]:
    parts = [part for tensor in tensors if tensor.device == device for part in _sums(tensor.detach())]
    return [torch.cat(parts)] if parts else []


def _sums(tensor: Tensor) -> list[Tensor]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.data_ptr() % 8 == 0 and flat.storage_offset() % 8 == 0:
        whole = flat.numel() // 8 * 8
        parts = [flat[:whole].view(torch.int64), flat[whole:].to(torch.int64)]
    else:
        parts = [flat.to(torch.int64)]
    return [total for part in parts for total in _in_chunks(part)]


def _in_chunks(values: Tensor) -> list[Tensor]:
    size = values.numel() // _CHUNKS
    body = values[: size * _CHUNKS].view(_CHUNKS, size).sum(1) if size else values[:0]
    return [body, values[size * _CHUNKS :].sum().view(1)]
