"""The cross entropy of logits that are never whole: torch's function is the oracle, for values and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.bench.counters import tallied
from lora_fx.errors import RefusedError
from lora_fx.liveness import crossentropy
from lora_fx.liveness.head import HeadSource
from lora_fx.liveness.rows import LazyRows, lazy

CLASSES = 7
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a chunk be of three rows, and blocks of one."""
    monkeypatch.setattr(crossentropy, "CHUNK_ROWS", 3)
    monkeypatch.setattr(crossentropy, "CHUNK_BYTES", 1)
    monkeypatch.setattr(crossentropy, "_CACHED_BYTES", 1)


class Head:
    """A frozen linear with an adapter on the hidden states of 2 x 5 tokens."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.x = torch.randn(2, 5, 4, generator=generator).to(dtype).requires_grad_()
        self.weight = torch.randn(CLASSES, 4, generator=generator).to(dtype)
        self.A = torch.randn(2, 4, generator=generator).to(dtype).requires_grad_()
        self.B = torch.randn(CLASSES, 2, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(0, CLASSES, (2, 5), generator=generator)
        self.weights = torch.rand(CLASSES, generator=generator, dtype=torch.float64).to(dtype)
        self.inputs = (self.x, self.A, self.B)

    def function(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, A), B)

    def eager(self) -> Tensor:
        return self.function(*self.inputs)

    def late(self) -> LazyRows:
        return lazy(HeadSource(self.x, self.function, (self.A, self.B), CLASSES, self.dtype))

    def assert_alike(self, loss: Any, chunked: bool = True) -> Tensor:
        """Assert that a loss of late logits, and its gradients, are those of eager ones; return the loss."""
        runs = []
        for logits in (self.eager(), self.late()):
            value = loss(logits)
            slope = torch.linspace(0.5, 2, value.numel()).reshape(value.shape).to(value.dtype)
            runs.append((value, *torch.autograd.grad(value, self.inputs, slope)))
        assert type(logits) is LazyRows
        assert logits.lazy_value.is_whole is not chunked
        for one, other in zip(*runs, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True, **TOLERANCES[self.dtype])
        return value


REDUCTIONS, SMOOTHINGS, YES = ("mean", "sum", "none"), (0.0, 0.1), (False, True)
CASES = list(itertools.product(TOLERANCES, REDUCTIONS, SMOOTHINGS, YES, YES, (0, 3, 10)))


@pytest.mark.parametrize(("dtype", "reduction", "smoothing", "weighted", "capped", "ignored"), CASES)
@pytest.mark.sampled(2)
def test_loss_and_gradients_are_those_of_torch(
    dtype: torch.dtype, reduction: str, smoothing: float, weighted: bool, capped: bool, ignored: int
):
    head = Head(dtype)
    head.labels.view(-1)[:ignored] = -100

    def loss(logits: Tensor) -> Tensor:
        wide = logits if dtype is torch.float64 else logits.float()
        if capped:
            wide = torch.tanh(wide / 3) * 3
        labels = F.pad(head.labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
        weight = head.weights.to(wide.dtype) if weighted else None
        flat = wide.view(-1, CLASSES)
        return F.cross_entropy(flat, labels, weight, reduction=reduction, label_smoothing=smoothing)

    head.assert_alike(loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ways_to_ask_for_the_loss_of_rows_are_chunked(reduction: str):
    head = Head()
    labels = head.labels.clone()
    labels[:, ::2] = 3

    def shifted(logits: Tensor) -> Tensor:
        return F.cross_entropy(
            logits[..., :-1, :].contiguous().view(-1, CLASSES), labels[..., 1:].reshape(-1), reduction=reduction
        )

    module = torch.nn.CrossEntropyLoss(ignore_index=3, reduction=reduction)
    head.assert_alike(shifted)
    head.assert_alike(lambda logits: module(logits.flatten(0, 1), labels.flatten()))
    head.assert_alike(lambda logits: F.cross_entropy(logits[1], labels[1], reduction=reduction))
    head.assert_alike(lambda logits: F.cross_entropy(logits[labels != 3], labels[labels != 3], reduction=reduction))


WHOLE: dict[str, Any] = {
    "classes in the second place": lambda logits, head: F.cross_entropy(logits.transpose(1, 2), head.labels),
    "probabilities": lambda logits, head: F.cross_entropy(
        logits.view(-1, CLASSES), F.one_hot(head.labels.view(-1), CLASSES).float()
    ),
    "one row": lambda logits, head: F.cross_entropy(logits[0, 0], head.labels[0, 0]),
    "log_softmax": lambda logits, head: F.nll_loss(F.log_softmax(logits.view(-1, CLASSES), -1), head.labels.view(-1)),
    "old spelling": lambda logits, head: F.cross_entropy(
        logits.view(-1, CLASSES), head.labels.view(-1), size_average=False
    ),
    "another loss": lambda logits, head: F.mse_loss(logits, torch.ones(2, 5, CLASSES)),
    "loss and logits": lambda logits, head: (
        logits.square().sum() + F.cross_entropy(logits.view(-1, CLASSES), head.labels.view(-1))
    ),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore:size_average")
def test_whatever_else_is_asked_is_computed_by_torch_from_whole_logits(name: str):
    head = Head()
    head.assert_alike(lambda logits: WHOLE[name](logits, head), chunked=False)


def test_the_loss_first_and_the_logits_after_it_give_the_sum_of_both_gradients():
    head = Head()

    def both(logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.view(-1, CLASSES), head.labels.view(-1))
        return loss + logits.square().mean() + logits.view(-1, CLASSES).logsumexp(-1).mean()

    head.assert_alike(both, chunked=False)


def test_no_rows_and_rows_without_labels_give_what_torch_gives():
    head = Head()
    none = torch.full((10,), -100)
    assert head.assert_alike(lambda logits: F.cross_entropy(logits.view(-1, CLASSES), none)).isnan()
    assert head.assert_alike(lambda logits: F.cross_entropy(logits[:0].reshape(-1, CLASSES), none[:0])).isnan()
    assert head.assert_alike(lambda logits: F.cross_entropy(logits.view(-1, CLASSES), none, reduction="sum")) == 0


def test_a_label_that_is_no_class_is_an_error():
    head = Head()
    labels = torch.full((10,), CLASSES)
    with pytest.raises((RuntimeError, IndexError)):
        F.cross_entropy(head.late().view(-1, CLASSES), labels)


def test_no_chunk_is_larger_than_asked_and_ignored_rows_meet_no_head():
    head, seen = Head(), []

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return head.function(x, A, B)

    labels = torch.tensor([-100, 1, -100, 2, 3, 4, -100, 5, -100, 6])
    logits = lazy(HeadSource(head.x, function, (head.A, head.B), CLASSES, torch.float32))
    F.cross_entropy(logits.view(-1, CLASSES), labels).backward()
    assert [len(rows) for rows in seen] == [3, 3]
    assert torch.equal(torch.cat(seen), head.x.detach().view(-1, 4)[labels != -100])
    assert head.x.grad is not None
    assert not head.x.grad.view(-1, 4)[labels == -100].any()


def test_the_same_bits_come_out_twice_and_a_graph_that_is_kept_can_be_used_twice():
    head = Head()
    losses = [F.cross_entropy(head.late().view(-1, CLASSES), head.labels.view(-1)) for _ in range(2)]
    runs = [torch.autograd.grad(loss, head.inputs, retain_graph=True) for loss in (*losses, losses[0])]
    assert torch.equal(*losses)
    for others in runs[1:]:
        assert all(map(torch.equal, runs[0], others))


def test_a_second_derivative_is_an_error_and_not_zero():
    head = Head()
    loss = F.cross_entropy(head.late().view(-1, CLASSES), head.labels.view(-1))
    with pytest.raises(RefusedError, match="gradients of gradients"):
        torch.autograd.grad(loss, head.x, create_graph=True)
    result, expected = (
        torch.autograd.grad(t.square().sum(), head.x, create_graph=True) for t in (head.late(), head.eager())
    )
    for one, other in zip(*(torch.autograd.grad(g[0].sum(), head.inputs) for g in (result, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_read_after_a_step_are_those_from_before_it():
    head = Head()
    before, logits = head.eager(), head.late()
    F.cross_entropy(logits.view(-1, CLASSES), head.labels.view(-1)).backward()
    with torch.no_grad():
        head.B.add_(1)
    assert torch.equal(logits.argmax(-1), before.argmax(-1))
    torch.testing.assert_close(logits.detach().cpu(), before.detach())
    with pytest.raises(RefusedError, match="first read after the adapter"):
        logits.sum().backward()


def test_logits_of_hidden_states_that_were_written_to_are_refused():
    head = Head()
    hidden = head.x * 1
    logits = lazy(HeadSource(hidden, head.function, (head.A, head.B), CLASSES, torch.float32))
    hidden.mul_(2)
    for ask in (lambda: (logits + 0).sum(), lambda: F.cross_entropy(logits.view(-1, CLASSES), head.labels.view(-1))):
        with pytest.raises(RefusedError, match="were written to"):
            ask()


def test_without_gradients_the_loss_alone_is_computed():
    head = Head()
    expected = F.cross_entropy(head.eager().view(-1, CLASSES), head.labels.view(-1))
    with torch.no_grad():
        loss = F.cross_entropy(head.late().view(-1, CLASSES), head.labels.view(-1))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    cut = F.cross_entropy(head.late().detach().view(-1, CLASSES), head.labels.view(-1))
    assert not cut.requires_grad


def test_small_gradients_survive_float16_when_the_loss_is_scaled_up():
    head = Head(torch.float16)
    scale = 2.0**16
    results = []
    for logits in (head.eager(), head.late()):
        loss = F.cross_entropy(logits.float().view(-1, CLASSES), head.labels.view(-1)) * 1e-4
        results.append(torch.autograd.grad(loss * scale, head.inputs))
    for one, other in zip(*results, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_autocast_gives_the_loss_the_dtype_that_torch_gives_it():
    head = Head(torch.bfloat16)
    for enabled in YES:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses = [F.cross_entropy(t.view(-1, CLASSES), head.labels.view(-1)) for t in (head.eager(), head.late())]
        assert losses[0].dtype == losses[1].dtype
        torch.testing.assert_close(*losses, **TOLERANCES[torch.bfloat16])


def test_one_chunk_of_logits_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crossentropy, "CHUNK_ROWS", 8)
    x, weight = torch.randn(64, 4, requires_grad=True), torch.randn(3000, 4)
    labels = torch.randint(0, 3000, (64,))

    def step() -> None:
        logits = lazy(HeadSource(x, lambda rows: F.linear(rows, weight), (), 3000, torch.float32))
        F.cross_entropy(logits, labels).backward()

    assert tallied(step).peak < 1.2 * 8 * 3000 * 4
