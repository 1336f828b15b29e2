"""Kinds of sites that are raw parameters: whatever multiplies them, however they are shown before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.sitekinds import Inputs, Kind


class Raw(nn.Module):
    """Parameters of these shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class Inside(nn.Module):
    """Holds the one that computes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def of(
    name: str, forward: Callable[..., Any], shape: tuple[int, ...], layout: str, inputs: Inputs, **more: Any
) -> Kind:
    """Return the kind of a module whose `forward(self, …)` computes with `self.w` of this shape; `self.b` is [5]."""
    kind = type("Raw", (Raw,), {"forward": forward})
    at_root = more.pop("root", False)
    shapes = {"w": shape, **({"b": (5,)} if more.pop("bias", False) else {})}
    make = (lambda: kind(shapes)) if at_root else (lambda: Inside(kind(shapes)))
    weight = "w" if at_root else "inner.w"
    return Kind(name, make, inputs, {weight: layout}, raw=True, **{"linear": True, **more})


def rows() -> tuple[Tensor]:
    return (torch.randn(2, 3, 6),)


def matrix() -> tuple[Tensor]:
    return (torch.randn(4, 6),)


def batches() -> tuple[Tensor]:
    return (torch.randn(3, 4, 6),)


def ids() -> tuple[Tensor]:
    return (torch.randint(0, 11, (2, 7)),)


def images() -> tuple[Tensor]:
    return (torch.randn(2, 4, 6, 6),)


OUT, IN = (5, 6), (6, 5)
PRODUCTS = [
    of("F.linear", lambda self, x: F.linear(x, self.w, self.b), OUT, "out_in", rows, bias=True),
    of("F.linear on the root", lambda self, x: F.linear(x, self.w), OUT, "out_in", rows, root=True),
    of("F.linear by keywords", lambda self, x: F.linear(input=x, weight=self.w), OUT, "out_in", rows),
    of("x @ w", lambda self, x: x @ self.w, IN, "in_out", rows),
    of("x @ w on the root", lambda self, x: x @ self.w, IN, "in_out", rows, root=True),
    of("w @ x", lambda self, x: self.w @ x, OUT, "out_in", lambda: (torch.randn(6, 4),)),
    of("w @ batches", lambda self, x: self.w @ x, OUT, "out_in", lambda: (torch.randn(2, 6, 4),)),
    of("w @ a vector", lambda self, x: self.w @ x, OUT, "out_in", lambda: (torch.randn(6),)),
    of("a vector @ w", lambda self, x: x @ self.w, IN, "in_out", lambda: (torch.randn(6),)),
    of("matmul", lambda self, x: torch.matmul(x, self.w), IN, "in_out", rows),
    of("method matmul", lambda self, x: x.matmul(self.w), IN, "in_out", rows),
    of("matmul by keywords", lambda self, x: torch.matmul(input=x, other=self.w), IN, "in_out", rows),
    of("mm", lambda self, x: torch.mm(x, self.w), IN, "in_out", matrix),
    of("mm from the left", lambda self, x: torch.mm(self.w, x.t()), OUT, "out_in", matrix),
    of("mv", lambda self, x: torch.mv(self.w, x), OUT, "out_in", lambda: (torch.randn(6),)),
    of("bmm with a bank", lambda self, x: torch.bmm(x, self.w), (3, 6, 5), "bank in_out", batches),
    of("bmm with a bank from the left", lambda self, x: torch.bmm(self.w, x.mT), (3, 5, 6), "bank out_in", batches),
    of("matmul with a bank", lambda self, x: x @ self.w, (3, 6, 5), "bank in_out", batches),
    of("bmm with an expanded matrix", lambda self, x: torch.bmm(x, self.w.unsqueeze(0).expand(3, -1, -1)), IN, "in_out", batches),
    of("baddbmm", lambda self, x: torch.baddbmm(x[..., :5], x, self.w), (3, 6, 5), "bank in_out", batches),
    of("addmm", lambda self, x: torch.addmm(self.b, x, self.w), IN, "in_out", matrix, bias=True),
    of("addmm, alpha and beta", lambda self, x: torch.addmm(self.b, x, self.w, beta=0.5, alpha=2.0), IN, "in_out", matrix, bias=True),
    of("method addmm", lambda self, x: self.b.expand(4, 5).addmm(x, self.w, alpha=3), IN, "in_out", matrix, bias=True),
    of("addmv", lambda self, x: torch.addmv(self.b, self.w, x, alpha=2), OUT, "out_in", lambda: (torch.randn(6),), bias=True),
    of("tensordot", lambda self, x: torch.tensordot(x, self.w, dims=1), IN, "in_out", rows, drops=False),
    of("einsum", lambda self, x: torch.einsum("bsd,dk->bsk", x, self.w), IN, "in_out", rows),
    of("einsum, the weight first", lambda self, x: torch.einsum("kd,bsd->bsk", self.w, x), OUT, "out_in", rows),
    of("einsum, dots", lambda self, x: torch.einsum("...d,dk->...k", x, self.w), IN, "in_out", rows),
    of("einsum, heads in a bank", lambda self, x: torch.einsum("bsd,hdk->bshk", x, self.w), (4, 6, 5), "bank in_out", rows),
    of("einsum, heads of a matrix", lambda self, x: torch.einsum("bsd,hkd->bshk", x, self.w.view(4, 3, 6)), (12, 6), "out_in", rows),
    of("einsum, heads of columns", lambda self, x: torch.einsum("bsd,dhk->bshk", x, self.w.view(6, 4, 3)), (6, 12), "in_out", rows),
    of("einsum, heads summed", lambda self, x: torch.einsum("bshk,hkd->bsd", x, self.w.view(2, 3, 5)), IN, "in_out",
       lambda: (torch.randn(2, 4, 2, 3),)),
    of("einsum, a bank each", lambda self, x: torch.einsum("gbd,gkd->gbk", x, self.w), (3, 5, 6), "bank out_in", batches),
]  # fmt: skip

VIEWED = [
    of("transposed: t", lambda self, x: F.linear(x, self.w.t()), IN, "in_out", rows),
    of("transposed: T", lambda self, x: x @ self.w.T, OUT, "out_in", rows),
    of("transposed: mT", lambda self, x: x @ self.w.mT, OUT, "out_in", rows),
    of("transposed: transpose", lambda self, x: x @ self.w.transpose(0, 1), OUT, "out_in", rows),
    of("transposed: permute", lambda self, x: torch.matmul(x, self.w.permute(1, 0)), OUT, "out_in", rows),
    of("transposed: a copy", lambda self, x: x @ self.w.t().contiguous(), OUT, "out_in", rows),
    of("sliced: rows", lambda self, x: F.linear(x, self.w[1:4]), OUT, "out_in", rows),
    of("sliced: columns", lambda self, x: F.linear(x[..., :4], self.w[:, 2:]), OUT, "out_in", rows),
    of("sliced: every second row", lambda self, x: F.linear(x, self.w[::2]), OUT, "out_in", rows),
    of("sliced: narrow", lambda self, x: F.linear(x, self.w.narrow(0, 2, 3)), OUT, "out_in", rows),
    of("sliced: one row", lambda self, x: x @ self.w[2], OUT, "out_in", rows, drops=False),
    of("chunked", lambda self, x: [F.linear(x, part) for part in self.w.chunk(3)], (12, 6), "out_in", rows),
    of("split", lambda self, x: [F.linear(x, part) for part in torch.split(self.w, [2, 3])], OUT, "out_in", rows),
    of("unbound", lambda self, x: [F.linear(x, part) for part in self.w.unbind()], (3, 5, 6), "bank out_in", rows),
    of("viewed", lambda self, x: [F.linear(x, part) for part in self.w.view(3, 4, 6)], (12, 6), "out_in", rows),
    of("reshaped", lambda self, x: F.linear(x, self.w.reshape(3, 4, 6)[1]), (12, 6), "out_in", rows),
    of("unflattened and flattened", lambda self, x: F.linear(x, self.w.unflatten(0, (3, 4)).flatten(0, 1)), (12, 6), "out_in", rows),
    of("a member of a bank", lambda self, x: F.linear(x, self.w[1]), (3, 5, 6), "bank out_in", rows),
    of("members picked by ids", lambda self, x: torch.bmm(x, self.w[torch.tensor([2, 0, 2])].mT), (3, 5, 6), "bank out_in", batches),
    of("cast: to", lambda self, x: F.linear(x, self.w.to(x.dtype)), OUT, "out_in", rows),
    of("cast: type_as", lambda self, x: F.linear(x, self.w.type_as(x)), OUT, "out_in", rows),
    of("cast: double and back", lambda self, x: F.linear(x.double(), self.w.double()), OUT, "out_in", rows),
    of("copied", lambda self, x: F.linear(x, self.w.clone().contiguous()), OUT, "out_in", rows),
    of("scaled before", lambda self, x: F.linear(x, self.w * 0.5), OUT, "out_in", rows, drops=False),
    of("gathered rows", lambda self, x: F.linear(x, self.w[torch.tensor([3, 1])]), OUT, "out_in", rows, drops=False),
    of("concatenated", lambda self, x: F.linear(x, torch.cat([self.w, self.w[:2]])), OUT, "out_in", rows, drops=False),
    of("stacked", lambda self, x: torch.bmm(x, torch.stack([self.w, -self.w, self.w])), IN, "in_out", batches, drops=False),
    of("masked", lambda self, x: F.linear(x, self.w.tril()), OUT, "out_in", rows, drops=False),
    of("used twice", lambda self, x: F.linear(F.linear(x, self.w), self.w.t()), OUT, "out_in", rows, linear=False),
]  # fmt: skip


class ReadsChild(nn.Module):
    """The weight of a linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.weight, self.child.bias)


class CallsAndReads(ReadsChild):
    """The child is called and read."""

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) @ self.child.weight


class ReadsRaw(nn.Module):
    """The raw parameter of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Raw({"w": OUT})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.w)


def _conv2d(self: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, self.w, stride=2, padding=1, groups=2)


OTHERS = [
    Kind("a child's weight", ReadsChild, rows, {"child.weight": "out_in"}, raw=True, linear=True),
    Kind("a child called and read", CallsAndReads, rows, {"child.weight": "out_in"}, raw=True),
    Kind("a child's raw parameter", ReadsRaw, rows, {"child.w": "out_in"}, raw=True, linear=True),
    of("F.embedding", lambda self, ids: F.embedding(ids, self.w), (11, 6), "in_out", ids),
    of("F.embedding, padding", lambda self, ids: F.embedding(ids, self.w, padding_idx=2), (11, 6), "in_out", ids),
    of("rows by ids", lambda self, ids: self.w[ids] @ self.w.t(), (11, 6), "out_in", ids, linear=False),
    of("F.conv2d", lambda self, x: F.conv2d(x, self.w), (8, 4, 3, 3), "out_in", images),
    of("F.conv2d, groups", _conv2d, (8, 2, 3, 3), "out_in", images),
    of("F.conv2d, same", lambda self, x: F.conv2d(x, self.w, None, 1, "same", 2), (8, 4, 3, 3), "out_in", images),
    of("F.conv1d", lambda self, x: F.conv1d(x.flatten(2), self.w, padding=1), (8, 4, 3), "out_in", images),
]  # fmt: skip
