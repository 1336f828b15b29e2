"""Tensors whose rows are computed when they are asked for: lazy where that is known to be right, else the whole value."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.errors import RefusedError
from lora_fx.liveness.rows import LazyRows, lazy, take, whole
from lora_fx.liveness.sources import RowSource


class Product(RowSource):
    """x Wᵀ, which counts how often it was computed as a whole, and which rows were taken."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
        self.weight = torch.randn(5, 4, generator=generator, requires_grad=True)
        self.shape, self.dtype, self.device = torch.Size((2, 3, 5)), self.x.dtype, self.x.device
        self.inputs = (self.x, self.weight)
        self.wholes = 0
        self.taken: list[list[int]] = []

    def take(self, rows: Tensor) -> Tensor:
        self.taken.append(rows.tolist())
        return self.x.reshape(-1, 4)[rows] @ self.weight.t()

    def whole(self) -> Tensor:
        self.wholes += 1
        return self.eager()

    def eager(self) -> Tensor:
        return self.x @ self.weight.t()

    def gradients(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(tensor, self.inputs, retain_graph=True)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values)


ROWWISE: dict[str, Callable[[Any], Any]] = {
    "cast": lambda t: t.double(),
    "to": lambda t: t.to("cpu", torch.float16),
    "to by name": lambda t: t.to(dtype=torch.bfloat16, device=torch.device("cpu")),
    "scale": lambda t: 2 * t / 3.0,
    "add": lambda t: t + 1,
    "add to": lambda t: 1 + t,
    "add a row": lambda t: t.double() + torch.arange(5.0, dtype=torch.float64),
    "take a row": lambda t: t.flatten(0, 1) - torch.arange(5.0).unsqueeze(0),
    "softcap": lambda t: torch.tanh(t / 30.0) * 30.0,
    "shift": lambda t: t[..., :-1, :].contiguous(),
    "flatten": lambda t: t.float().view(-1, 5),
    "shift and flatten": lambda t: t[:, 1:].reshape(-1, t.size(-1)),
    "flatten dimensions": lambda t: t.flatten(0, 1),
    "one sequence": lambda t: t[0],
    "one row": lambda t: t[-1, 0],
    "last position": lambda t: t[:, -1, :],
    "positions": lambda t: t[:, numbers(2, 0)],
    "mask": lambda t: t[torch.tensor([[True, False, True], [False, False, True]])],
    "new dimension": lambda t: t[None].unsqueeze(1).squeeze(0),
    "steps": lambda t: t[:, ::2][1:, ...],
}
WHOLE: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda t: t.argmax(-1),
    "columns": lambda t: t[..., :2],
    "one number": lambda t: t[0, 1, 2],
    "list": lambda t: t[[0]],
    "transpose": lambda t: t.transpose(1, 2),
    "add a part of a row": lambda t: t + torch.arange(3.0).unsqueeze(1),
    "scale by a tensor": lambda t: t * torch.tensor(2.0),
    "reshape the columns": lambda t: t.reshape(-1),
    "softmax": lambda t: t.softmax(-1),
    "two of them": lambda t: torch.cat([t, t.float()]),
    "integers": lambda t: t.to(torch.int64),
    "rounded division": lambda t: t.div(2, rounding_mode="floor"),
    "numpy": lambda t: torch.from_numpy(t.detach().numpy()),
    "loop": lambda t: torch.stack(list(t)),
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "item": lambda t: torch.tensor(t.sum().item()),
    "view as integers": lambda t: t.detach().view(torch.int32),
    "data": lambda t: t.data,
    "cpu": lambda t: t.cpu(),
    "strides": lambda t: torch.tensor(t.stride()),
    "clone": lambda t: t.clone(),
    "list of numbers": lambda t: torch.tensor(t.tolist()),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_an_operation_on_rows_gives_a_lazy_tensor_with_the_rows_and_the_whole_that_torch_gives(name: str):
    call, source = ROWWISE[name], Product()
    expected = call(source.eager())
    result = call(lazy(source))
    assert type(result) is LazyRows
    assert not source.wholes
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert result.requires_grad
    assert not result.is_leaf
    rows = expected.reshape(-1, 5)
    some = numbers(len(rows) - 1, 0)
    taken = take(result, some)
    torch.testing.assert_close(taken, rows[some])
    assert not source.wholes
    for one, other in zip(source.gradients(taken.sum()), source.gradients(rows[some].sum()), strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(result + 0, expected)
    assert torch.equal(whole(result), expected)
    assert source.wholes == 1
    assert torch.equal(take(result, some), rows[some])
    for one, other in zip(source.gradients((result * 2).sum()), source.gradients((expected * 2).sum()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", WHOLE)
def test_whatever_else_is_done_meets_the_whole_value_computed_once(name: str):
    call, source = WHOLE[name], Product()
    tensor = lazy(source)
    for _ in range(2):
        result, expected = call(tensor), call(source.eager())
        assert type(result) is Tensor
        assert torch.equal(result, expected)
        assert result.requires_grad == expected.requires_grad
    assert source.wholes == 1


def test_what_tensors_tell_of_themselves_needs_no_value():
    source = Product()
    tensor = lazy(source)
    assert isinstance(tensor, Tensor)
    assert len(tensor) == 2
    assert tensor.numel() == 30
    assert tensor.size(-1) == 5
    assert tensor.dim() == tensor.ndim == 3
    assert tensor.is_floating_point()
    assert torch.is_tensor(tensor)
    assert tensor.dtype is torch.float32
    assert tensor.device.type == "cpu"
    assert not tensor.is_cuda
    assert tensor.requires_grad
    assert tensor.grad_fn is not None
    assert not tensor.is_leaf
    assert not source.wholes
    assert repr(tensor) == repr(source.eager())


def test_it_can_be_saved_as_the_tensor_that_it_is():
    source, file = Product(), io.BytesIO()
    torch.save({"logits": lazy(source)}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], source.eager())


def test_code_that_torch_does_not_ask_about_meets_the_value_and_its_gradients_arrive():
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient * x.exp()

    source = Product()
    tensor, eager = lazy(source), source.eager()
    result, expected = Exp.apply(tensor.float()).sum() + tensor.sum(), eager.exp().sum() + eager.sum()
    torch.testing.assert_close(result, expected)
    for one, other in zip(source.gradients(result), source.gradients(expected), strict=True):
        torch.testing.assert_close(one, other)
    below = lazy(source)
    with torch._C.DisableTorchFunctionSubclass():
        result = below.view(-1, 5).square().sum()
    for one, other in zip(
        source.gradients(result + below.sum()), source.gradients(eager.square().sum() + eager.sum()), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["counted", "by data", "by numpy", "in inference mode"])
def test_a_row_that_is_added_is_the_one_from_then_whoever_writes_to_it(kind: str) -> None:
    with torch.inference_mode(kind == "in inference mode"):
        row = torch.ones(1, 5)
    source = Product()
    result, eager = lazy(source) + row, source.eager() + torch.ones(1, 5)
    assert type(result) is LazyRows
    if kind == "counted":
        row.mul_(2)
    elif kind == "by numpy":
        row.numpy()[:] = 2
    else:
        with torch.inference_mode(kind != "by data"):
            row.data.mul_(2)
    assert torch.equal(whole(result), eager)


@pytest.mark.parametrize("index", [torch.tensor([1, 0]), torch.tensor([True, False])], ids=["numbers", "mask"])
def test_rows_are_those_that_were_chosen_whatever_is_written_to_the_index_later(index: Tensor) -> None:
    source, index = Product(), index.clone()
    result, eager = lazy(source)[index], source.eager()[index]
    assert type(result) is LazyRows
    index.copy_(index.flip(0))
    assert torch.equal(whole(result), eager)


def test_no_gradient_passes_where_torch_passes_none():
    source = Product()
    tensor = lazy(source)
    detached = tensor.detach()
    with torch.no_grad():
        inside = tensor.view(-1, 5)
    for result in (detached, inside, detached.float().double()):
        assert type(result) is LazyRows
        assert not result.requires_grad
        assert not take(result, numbers(1)).requires_grad
        assert not (result + 0).requires_grad
        assert not whole(result).requires_grad
    with torch.inference_mode():
        assert torch.equal(lazy(source).argmax(-1), source.eager().argmax(-1))
    assert (tensor + 0).requires_grad


def test_what_is_written_to_it_is_seen_where_torch_shows_it():
    source = Product()
    tensor = lazy(source)
    view, detached = tensor.view(-1, 5), tensor.detach()
    tensor[0] = 0
    for shown in (tensor, view, detached):
        assert (shown.reshape(2, 3, 5)[0] == 0).all()
        assert (take(shown, numbers(1)) == 0).all()
    tensor += 1
    assert type(tensor) is Tensor
    assert (view[0] == 1).all()


def test_a_copy_of_what_has_been_written_to_since_is_refused():
    tensor = lazy(Product())
    copy = tensor.double()
    tensor[0] = 0
    with pytest.raises(RefusedError, match="written to since"):
        copy.sum()


def test_the_gradient_of_rows_that_were_used_alone_is_refused_and_not_left_out():
    source = Product()
    tensor = lazy(source)
    flat = tensor.view(-1, 5)
    loss = take(flat, numbers(0, 2)).sum()
    for ask in (tensor.retain_grad, lambda: tensor.register_hook(print), lambda: torch.autograd.grad(loss, tensor)):
        with pytest.raises(RefusedError, match="the gradient of logits"):
            ask()


def test_a_hook_that_is_there_before_its_rows_are_used_is_called():
    source, seen = Product(), []
    tensor = lazy(source)
    tensor.register_hook(seen.append)
    tensor.retain_grad()
    take(tensor.view(-1, 5), numbers(0, 2)).sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], tensor.grad)
    assert seen[0].sum() == 10


def test_a_compiled_function_meets_the_value():
    source, targets = Product(), numbers(0, 1, 2, 3, 4, 0)
    compiled = torch.compile(lambda logits: F.cross_entropy(logits.view(-1, 5), targets), backend="eager")
    with pytest.warns(UserWarning, match="Dynamo"):
        loss = compiled(lazy(source))
    torch.testing.assert_close(loss, F.cross_entropy(source.eager().view(-1, 5), targets))
