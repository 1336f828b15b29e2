"""Late logits are those of the forward, whatever has been written to since, or nothing at all."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lora_fx.errors import RefusedError
from lora_fx.liveness.head import HeadSource
from lora_fx.liveness.rows import LazyRows, lazy


def _logits() -> tuple[LazyRows, Tensor, Tensor, Tensor]:
    """Return late logits, the same eager, the trained factor and the frozen weight."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weight, factor = torch.randn(9, 4).double(), nn.Parameter(torch.randn(9, 4).double())

    def function(rows: Tensor, trained: Tensor) -> Tensor:
        return F.linear(rows, weight + trained)

    late = lazy(HeadSource(x, function, [factor], 9, x.dtype, [weight]))
    return late, function(x, factor).detach(), factor, weight


LABELS = torch.arange(6)


@pytest.mark.parametrize("counted", [True, False])
def test_a_loss_after_a_step_is_that_of_the_forward(counted: bool) -> None:
    late, eager, factor, _ = _logits()
    with torch.no_grad():
        (factor if counted else factor.data).add_(1)
    assert torch.allclose(F.cross_entropy(late, LABELS), F.cross_entropy(eager, LABELS))
    assert torch.equal(late + 0, eager)


def test_a_written_frozen_weight_is_refused() -> None:
    late, _, _, weight = _logits()
    weight.mul_(2)
    with pytest.raises(RefusedError, match="weight of the head"):
        F.cross_entropy(late, LABELS)


class _TripledInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        x.mul_(3)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 3 * gradient


def test_the_history_of_a_function_that_writes_in_place_counts() -> None:
    gradients = []
    for plain in (False, True):
        late, _, factor, _ = _logits()
        given = late.clone() if plain else late * 1.0
        loss = F.cross_entropy(_TripledInPlace.apply(given), LABELS)  # type: ignore[no-untyped-call]
        gradients.append(torch.autograd.grad(loss, factor)[0])
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-12)


def test_a_loss_without_gradients_leaves_those_of_the_logits() -> None:
    late, _, _, _ = _logits()
    with torch.no_grad():
        F.cross_entropy(late, LABELS)
    assert torch.autograd.grad(late.square().sum(), late)[0].shape == late.shape


def test_arguments_that_torch_refuses_are_refused() -> None:
    late, _, _, _ = _logits()
    with pytest.raises(RuntimeError, match="label_smoothing"):
        F.cross_entropy(late, LABELS, label_smoothing=1.5)
    with pytest.raises(RuntimeError, match="weight tensor"):
        F.cross_entropy(_logits()[0], LABELS, weight=torch.ones(12).double())
    with pytest.raises(IndexError):
        F.cross_entropy(_logits()[0], LABELS + 5)


def test_a_checkpointed_loss_whose_logits_are_read_meanwhile() -> None:
    late, eager, _, _ = _logits()

    def loss_of(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, LABELS)

    loss = torch.utils.checkpoint.checkpoint(loss_of, late, use_reentrant=False)
    assert torch.equal(late.argmax(-1), eager.argmax(-1))
    loss.backward()


def test_shape_and_flags_are_those_of_what_was_made() -> None:
    late, _, _, _ = _logits()
    late.unsqueeze_(0)
    assert late.shape == (1, 6, 9)
    apart = _logits()[0].detach()
    apart.requires_grad_()
    assert apart.requires_grad
