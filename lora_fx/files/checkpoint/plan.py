"""What becomes of every tensor of a checkpoint when adapters are merged into it, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fx.files.checkpoint.basefiles import BaseCheckpoint
from lora_fx.files.safetensors import RawFile, RawTensor


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
    outputs_first: bool
    """Whether a row of the stored weight is one output; Conv1D stores [in, out]."""

    @property
    def rank(self) -> int:
        """The largest of the adapters'."""
        return max(term.left.shape[1] for term in self.terms)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor trained whole, which takes the place of the base's."""

    tensor: Tensor
    adapter: str


Work = WeightFold | Value


@dataclass(frozen=True, slots=True)
class Addition:
    """A tensor that the checkpoint does not have: a head that was trained whole, or one that was tied."""

    dtype: str
    shape: tuple[int, ...]
    work: Work


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge does; tensors that are not named stay as they are (but for `out_dtype`)."""

    base: BaseCheckpoint
    works: dict[str, Work]
    additions: dict[str, Addition] = field(default_factory=dict)
    untie: bool = False
    """Whether config.json must say that head and embedding are no longer one tensor."""
    out_dtype: torch.dtype | None = None
