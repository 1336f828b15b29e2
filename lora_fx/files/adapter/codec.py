"""Factors as PEFT keeps them in a file, and back.

A linear's are what they are.  A convolution's have its shape; a grouped one's A becomes one block for each group, which
is the same map with g · r ranks.  A bank of experts is one matrix: A [bank · r, in], B [out, r · bank].  A raw
parameter has the factors of what is stored, whichever way round it multiplies; of a bank, PEFT takes the matrices as
stored [out, in] unless their module says `is_transposed`; a factor that all its members share stands there for each.
Parts of a fused weight become n · r ranks with zeros in B.

For example, a weight [24, 8] of q, k and v (8 rows each), of which q and v are adapted with r 2 and alpha 16:

    lora_A [4, 8]     rows 0-1: A of q, rows 2-3: A of v
    lora_B [24, 4]    rows 0-7, columns 0-1: B of q; rows 16-23, columns 2-3: B of v; 0 elsewhere, as k is not adapted
    configuration     r 4, lora_alpha 32: the scaling is 8, as it is of the parts
    header            r 2, alpha 16, file_ranks 2, slices of [q, k, v], adapt [q, v]
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import Attached
from lora_fx.adapters.factors.kinds import Convolution, ConvolutionA
from lora_fx.adapters.factors.moved import MovedA, MovedB, take_plain
from lora_fx.files.adapter.site import blocks_of_groups, first_block, members_of
from lora_fx.planning.planned import PlannedSite
from lora_fx.planning.sites import CONVOLUTIONS, Layout, Site
from lora_fx.rules.inits import pairs_of


def filled(value: Tensor, target: Tensor) -> Tensor:
    """Return the value in the shape of the target, zero where it has no rank."""
    if value.shape == target.shape:
        return value
    whole = torch.zeros(target.shape, dtype=target.dtype, device=target.device)
    whole[tuple(slice(size) for size in value.shape)] = value
    return whole


def scaled(factor: Tensor, ratio: float) -> Tensor:
    """Return a factor times a number, in float32 at least: in half precision it would be rounded, or too small."""
    return factor if ratio == 1 else factor.to(torch.promote_types(factor.dtype, torch.float32)) * ratio


@dataclass(frozen=True, slots=True)
class Form:
    """How the factors of a site are laid out in a file."""

    op: str
    bank: int | None
    out_features: int
    inner: tuple[int, ...]
    """Sizes of the inputs: (in,), or (in / groups, kernel…)."""
    groups: int
    flipped: bool
    """Whether the file has the factors of the transposed matrix."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in the file, for an inner dimension of `rank`."""
        if self.op in CONVOLUTIONS and len(self.inner) > 1:
            ones = tuple(1 for _ in self.inner[1:])
            first = (self.groups * rank, self.groups * self.inner[0], *self.inner[1:])
            return first, (self.out_features, rank, *ones)
        inputs, outputs = self.inner[0], self.out_features
        if self.flipped:
            inputs, outputs = outputs, inputs
        ranks = rank * self.groups * (self.bank or 1)
        return (ranks, inputs), (outputs, ranks)


def form_of(site: Site, owner: nn.Module) -> Form:
    """Return the form of a site whose weight `owner` holds.

    A functional convolution's weight counts as a matrix.
    """
    out_features, in_features = site.features
    if site.op in CONVOLUTIONS and isinstance(owner, Convolution) and not site.parameter:
        return Form(site.op, None, out_features, site.shape[1:], owner.groups, False)
    bank, stored = (site.bank, banked_layout(owner)) if site.is_banked else (None, "out_in")
    return Form(site.op, bank, out_features, (in_features,), 1, bool(site.parameter) and site.layout != stored)


def numbers_in_file(planned: PlannedSite, owner: nn.Module) -> int:
    """Return how many numbers a file holds for the factors of a planned site; zeros between parts count too."""
    assert planned.lora is not None
    parts = 1 if planned.slices is None else len(planned.slices.adapt)
    ranks = planned.lora.r * parts * pairs_of(planned.lora.init)
    return sum(map(prod, form_of(planned.site, owner).shapes(ranks)))


def banked_layout(owner: nn.Module) -> Layout:
    """Return how PEFT takes the matrices of a bank to be stored; transformers' modules of experts say so."""
    return "in_out" if getattr(owner, "is_transposed", False) else "out_in"


def has_other_border(owner: nn.Module) -> bool:
    """Whether it is a convolution with a padding_mode or dilation, which PEFT 0.21 leaves out of its adapters."""
    return isinstance(owner, Convolution) and (owner.padding_mode, {*owner.dilation}) != ("zeros", {1})


def encoded(adapter: Attached) -> tuple[Tensor, Tensor]:
    """Return the factors A and B of an adapter as a file holds them."""
    A = adapter.lora_A.plain
    if isinstance(adapter.lora_A, ConvolutionA):
        return blocks_of_groups(A, adapter.lora_A.groups), adapter.lora_B.weight
    B, form = adapter.lora_B.plain, form_of(adapter.spec.site, adapter.owner)
    if form.flipped:
        A, B = B.mT, A.mT
    if form.bank is not None:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    return A, B


def misfit(form: Form, parts: tuple[tuple[int, ...], ...], share: str, A: Tensor, B: Tensor) -> str | None:
    """Return why factors of the right shapes are not such as an adapter of this site can have; None if they are.

    Args:
        form: of the site.
        parts: rows of each adapted part of the weight; empty if it is adapted whole.
        share: "A" or "B" if all members of a bank have that factor together; "none" if each has its own.
        A: as the file holds it.
        B: as the file holds it.
    """
    if form.groups > 1 and not torch.equal(blocks_of_groups(first_block(A, form.groups), form.groups), A):
        return mixes_groups(form.groups)
    if share != "none" and (problem := _misfit_of_shared(form, parts, share, A, B)) is not None:
        return problem
    if parts:
        _, whole = _matrices(A, B, form)
        outside = whole.reshape(*whole.shape[:-1], len(parts), -1).clone()
        for number, rows in enumerate(parts):
            outside[..., rows, number, :] = 0
        if bool(outside.any()):
            return "its lora_B has values outside of the slices"
    return None


def _misfit_of_shared(form: Form, parts: tuple[tuple[int, ...], ...], share: str, A: Tensor, B: Tensor) -> str | None:
    if form.bank is None or parts:
        return f"its experts share {share}, and it is no whole bank"
    factor = _matrices(A, B, form)[share == "B"]
    is_one = torch.equal(factor, factor[:1].expand_as(factor))
    return None if is_one else f"its experts share {share}, and their lora_{share} differ"


def mixes_groups(groups: int) -> str:
    """Return the reason why what PEFT trains at a grouped convolution is refused."""
    return (
        f"its lora_A reads the channels of all {groups} groups of the convolution, whose weight has for each output "
        "only those of one: no weight computes the same; run it in PEFT, or train this layer with lora_fx"
    )


def decode(adapter: Attached, A: Tensor, B: Tensor) -> None:
    """Copy the factors of a file into an adapter, in place; there must be no `misfit`."""
    A, B = as_plain(adapter, A, B)
    if isinstance(adapter.lora_A, MovedA) and isinstance(adapter.lora_B, MovedB):
        take_plain(adapter.lora_A, adapter.lora_B, A, B)
        return
    with torch.no_grad():
        adapter.lora_A.weight.copy_(adapter.lora_A.values_of(A))
        adapter.lora_B.weight.copy_(adapter.lora_B.values_of(B))


def as_plain(adapter: Attached, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of a file as an adapter's are by `plain`, of the file's rank."""
    if isinstance(adapter.lora_A, ConvolutionA):
        return first_block(A, adapter.lora_A.groups), B
    return _matrices(A, B, form_of(adapter.spec.site, adapter.owner))


def _matrices(A: Tensor, B: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return a file's factors as [.., ranks, in] and [.., out, ranks]: what `encoded` was given."""
    if form.bank is not None:
        B, A = members_of(B, A, form.bank)
    return (B.mT, A.mT) if form.flipped else (A, B)
