"""One site of an adapter, as its files hold it: the same when it is written and when it is read."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.names import bias_key, factor_key, factor_names, magnitude_key
from lora_fx.files.adapter.noted import NOTED
from lora_fx.planning.sites import Layout
from lora_fx.rules.inits import is_moved
from lora_fx.rules.ruleset import LoRAConfig


@dataclass(frozen=True, slots=True)
class SavedSite:
    """The tensors of one site, and what is known of it."""

    stem: str
    """What stands for the site in the keys."""
    path: str
    """Path of the site; of a raw parameter in PEFT's own files, its stem."""
    lora: LoRAConfig
    lora_A: Tensor
    """As the file holds it; `codec` says how for each kind of site."""
    lora_B: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    """DoRA's lengths."""
    embedding: bool
    """Whether the keys are those of an embedding."""
    added_bias: Tensor | None = None
    """What PEFT's lora_B adds to the layer's bias, before it is scaled."""
    noted: bool = False
    """Whether lora_fx has noted what follows; PEFT tells nothing of it."""
    rule: str = ""
    op: str = ""
    parameter: str = ""
    """Dotted name of the weight where it is a raw parameter."""
    layout: Layout = "out_in"
    read: bool = False
    """Whether code reads the weight, instead of (or besides) calling the module that owns it."""
    slices: dict[str, Any] | None = None
    call: int | None = None
    """The call that the adapter serves, where each has its own, and how many there are."""
    calls: int = 0
    file_ranks: int = 1
    """How many times r the configuration's rank is: of parts of the weight, groups of a convolution, moved adapters."""

    @property
    def name(self) -> str:
        """What PEFT's patterns call the site."""
        return self.parameter or self.stem

    @property
    def rank(self) -> int:
        """The rank by the configuration."""
        return self.lora.r * self.file_ranks

    @property
    def on_residual(self) -> bool:
        """Whether PEFT trained it on what is left of the base after taking away parts of it: B A alone is no ΔW."""
        return not self.noted and is_moved(self.lora.init)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return B [.., out, ranks] and A [.., ranks, in], of which the product is ΔW / scaling; a bank has members.

        Raises:
            AdapterFileError: what the factors add to the base depends on the base itself.
        """
        if self.on_residual:
            raise AdapterFileError(
                "adapter_config.json",
                f"has factors by `{self.lora.init}`, trained on what is left of the base after taking them away",
                [(self.path, "B A is not what it adds to the base")],
                "load it onto its base with lora_fx.load, and save it from there",
            )
        groups = self.lora_A.shape[0] // max(1, self.lora_B.shape[1]) if self.lora_A.dim() > 2 else 1
        if groups > 1:
            return _of_groups(self.lora_B, self.lora_A, groups)
        A, B = self.lora_A.flatten(1), self.lora_B.flatten(1)
        members = A.shape[0] // self.rank
        return members_of(B, A, members) if members > 1 and B.shape[1] == A.shape[0] else (B, A)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is written of the site, by its keys."""
        first, second = factor_names(self.embedding)
        tensors = {factor_key(self.stem, first): self.lora_A, factor_key(self.stem, second): self.lora_B}
        if self.magnitude is not None:
            tensors[magnitude_key(self.stem)] = self.magnitude
        if self.bias is not None:
            tensors[bias_key(self.path)] = self.bias
        return tensors

    def note(self) -> dict[str, Any]:
        """Return what the header says of the site; what is as for a plain linear is left out."""
        defaults = {attribute.name: attribute.default for attribute in fields(self)}
        values = {name: getattr(self, name) for name in NOTED}
        extra = {name: value for name, value in values.items() if value != defaults[name]}
        return self.lora.to_dict() | {"path": self.path, "op": self.op, "rule": self.rule} | extra


def members_of(B: Tensor, A: Tensor, members: int) -> tuple[Tensor, Tensor]:
    """Return a bank's factors as B [members, out, r] and A [members, r, in], of a file's [out, r · members] and
    [members · r, in].
    """
    return B.reshape(B.shape[0], -1, members).permute(2, 0, 1), A.reshape(members, -1, A.shape[1])


def blocks_of_groups(filters: Tensor, groups: int) -> Tensor:
    """Return filters [r, in / g, …] as [g · r, in, …], each group's in its own channels."""
    if groups == 1:
        return filters
    r, channels = filters.shape[:2]
    whole = filters.new_zeros(groups, r, groups, channels, *filters.shape[2:])
    for group in range(groups):
        whole[group, :, group] = filters
    return whole.flatten(0, 1).flatten(1, 2)


def first_block(A: Tensor, groups: int) -> Tensor:
    """Return the filters [r, in / g, …] of which a file's [g · r, in, …] has a block for each group."""
    rows, channels = A.shape[0] // groups, A.shape[1] // groups
    return A[:rows, :channels]


def _of_groups(B: Tensor, A: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return B and A as matrices; of PEFT's, whose A reads the channels of all groups, B with its blocks apart."""
    filters = first_block(A, groups)
    if torch.equal(blocks_of_groups(filters, groups), A):
        return B.flatten(1), filters.flatten(1)
    apart: Tensor = torch.block_diag(*B.flatten(1).chunk(groups))  # type: ignore[no-untyped-call]
    return apart, A.flatten(1)
