"""How the merged files will look, byte for byte, before the first is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lora_fx.files.checkpoint.plan import Addition, MergePlan, Work
from lora_fx.files.safetensors import BITS, RawFile, RawTensor, header_bytes
from lora_fx.files.values import FLOATS, NAME_OF


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor as it will be written, with what it is made from: its base, a work, or both."""

    name: str
    entry: RawTensor
    base: RawTensor | None
    work: Work | None


@dataclass(frozen=True, slots=True)
class OutShard:
    """A file as it will be written: its header, then the tensors in the order of their bytes."""

    name: str
    source: RawFile
    header: bytes | None
    """None: the header of the source, byte by byte."""
    data_start: int
    tensors: tuple[OutTensor, ...]

    @property
    def size(self) -> int:
        """In bytes, with the header."""
        return self.data_start + (self.tensors[-1].entry.end if self.tensors else 0)


def out_shard(plan: MergePlan, name: str) -> OutShard:
    """Return how a shard will be written.

    Where no dtype changes and nothing is added the header is that of the base; otherwise wide dtypes come first, so
    that every tensor begins at a multiple of its size.
    """
    source = plan.base.shards[name]
    tensors = [OutTensor(key, _entry(plan, raw), raw, plan.works.get(key)) for key, raw in source.tensors.items()]
    if name == list(plan.base.shards)[-1]:
        tensors += [
            OutTensor(key, _added(plan, addition), None, addition.work) for key, addition in plan.additions.items()
        ]
    if [tensor.entry for tensor in tensors] == list(source.tensors.values()):
        return OutShard(name, source, None, source.data_start, tuple(tensors))
    tensors = list(_placed(tensors))
    header = header_bytes(((tensor.name, tensor.entry) for tensor in tensors), source.metadata)
    return OutShard(name, source, header, len(header), tuple(tensors))


def _entry(plan: MergePlan, raw: RawTensor) -> RawTensor:
    return raw if plan.out_dtype is None or raw.dtype not in FLOATS else raw._replace(dtype=NAME_OF[plan.out_dtype])


def _added(plan: MergePlan, addition: Addition) -> RawTensor:
    return _entry(plan, RawTensor(addition.dtype, addition.shape, 0, 0))


def _placed(tensors: Sequence[OutTensor]) -> Iterator[OutTensor]:
    """Yield the tensors with their places in the new file."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: -BITS[tensor.entry.dtype]):
        end = position + tensor.entry.elements * BITS[tensor.entry.dtype] // 8
        yield OutTensor(tensor.name, tensor.entry._replace(start=position, end=end), tensor.base, tensor.work)
        position = end
