"""What becomes of every tensor of a checkpoint when adapters are merged into it, and where it will lie, as data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_fx.files.checkpoint.basefiles import BaseCheckpoint
from lora_fx.files.checkpoint.codes import CodedWeight
from lora_fx.files.covariances import LayerInputs
from lora_fx.files.safetensors import BITS, RawFile, RawTensor, header_bytes
from lora_fx.files.values import FLOATS, NAME_OF


@dataclass(frozen=True, slots=True)
class LowRankTerm:
    """scaling · left right, in the layout in which the weight is stored: [rows, columns]."""

    left: Tensor
    """[rows, r]"""
    right: Tensor
    """[r, columns]"""
    scaling: float


@dataclass(frozen=True, slots=True)
class WeightFold:
    """W + Σ scaling · B A, and DoRA's lengths where they are given."""

    file: RawFile
    base: RawTensor
    rows: int
    columns: int
    terms: tuple[LowRankTerm, ...]
    adapters: tuple[str, ...]
    magnitude: Tensor | None
    """[out]; NaN for an output that keeps its length, since it is in no adapted part."""
    outputs_first: bool
    """Whether a row of the stored weight is one output; Conv1D stores [in, out]."""

    @property
    def rank(self) -> int:
        """The largest of the adapters'."""
        return max(term.left.shape[1] for term in self.terms)


@dataclass(frozen=True, slots=True)
class CodeFold:
    """The same of a weight that is held as codes, on the grid of its base."""

    fold: WeightFold
    coded: CodedWeight
    inputs: LayerInputs | None
    """By which codes are chosen; None takes the nearest."""

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.fold.adapters


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor trained whole, which takes the place of the base's."""

    tensor: Tensor
    adapters: tuple[str, ...]


PlainWork = WeightFold | Value
Work = PlainWork | CodeFold


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor as it will be written, with what it is made from: its base, a work, or both."""

    name: str
    entry: RawTensor
    base: RawTensor | None
    work: Work | None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge does; tensors that are not named stay as they are (but for `out_dtype`)."""

    base: BaseCheckpoint
    works: dict[str, Work]
    additions: tuple[OutTensor, ...] = ()
    """Tensors that the checkpoint does not have: heads that were trained whole or were tied; not yet placed."""
    untie: bool = False
    """Whether config.json must say that head and embedding are no longer one tensor."""
    out_dtype: torch.dtype | None = None


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
        tensors += [replace(addition, entry=_entry(plan, addition.entry)) for addition in plan.additions]
    if [tensor.entry for tensor in tensors] == list(source.tensors.values()):
        return OutShard(name, source, None, source.data_start, tuple(tensors))
    tensors = list(_placed(tensors))
    header = header_bytes(((tensor.name, tensor.entry) for tensor in tensors), source.metadata)
    return OutShard(name, source, header, len(header), tuple(tensors))


def _entry(plan: MergePlan, raw: RawTensor) -> RawTensor:
    return raw if plan.out_dtype is None or raw.dtype not in FLOATS else raw._replace(dtype=NAME_OF[plan.out_dtype])


def _placed(tensors: Sequence[OutTensor]) -> Iterator[OutTensor]:
    """Yield the tensors with their places in the new file."""
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: -BITS[tensor.entry.dtype]):
        end = position + tensor.entry.elements * BITS[tensor.entry.dtype] // 8
        yield replace(tensor, entry=tensor.entry._replace(start=position, end=end))
        position = end
