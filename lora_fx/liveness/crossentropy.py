"""Cross entropy of logits that are never whole: chunk by chunk of the rows that have a label, gradients included.

For a row with the label y, of V classes with weights w and with smoothing ε (torch's definition):

    loss = (1 - ε) w_y (-log p_y) + ε/V Σ w_c (-log p_c)            p = softmax(logits)
    dlogits = p · ((1 - ε) w_y + ε/V Σ w_c) - (1 - ε) w_y [c = y] - ε/V w_c

A chunk's logits become their own gradient in place, and meet the head's backward at once, so that of all logits only
one chunk is ever there.  What is kept for the backward pass is the gradient of the head's input and of its adapter for
a loss of slope 1; it is scaled there, in float32: with float16, a loss that is scaled up keeps its small gradients.

Source: torch.nn.functional.cross_entropy; gradients in the forward pass: Hsu et al. 2024, arXiv:2410.10989, §3.2.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.fused.eligible import is_watched
from lora_fx.adapters.fused.terms import autocast_dtype
from lora_fx.errors import RefusedError
from lora_fx.liveness.head import HeadSource, without_autocast
from lora_fx.liveness.rows import LazyRows, handles, take
from lora_fx.liveness.sources import Cast, Step
from lora_fx.models.torch_internals import checkpointing, in_backward

CHUNK_ROWS, CHUNK_BYTES = 256, 1 << 26
"""A chunk has so many rows at the least, for products of few rows are slow, and about so many bytes of logits.

Measured with a vocabulary of 151,936: 512 rows take 1.3 times as long by 64 as by 256, and so as long as all at once.
"""
_CACHED_BYTES = 1 << 23
"""Of the rows on which a processor does all that is done to single entries, before it turns to the next ones."""


def _of_labelled(
    logits: LazyRows, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, smoothing: float
) -> Any:
    """Return the loss of logits that no late head makes, of the rows with a label alone: others count for nothing."""
    labelled = (target != ignore_index).nonzero().flatten()
    if reduction == "none" or len(labelled) == len(target):
        return NotImplemented
    taken = take(logits, labelled)
    return F.cross_entropy(taken, target[labelled], weight, reduction=reduction, label_smoothing=smoothing)


def install() -> None:
    """Let a cross entropy take the rows of lazy logits that it needs."""
    handles(F.cross_entropy)(cross_entropy)


def cross_entropy(
    input: LazyRows,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Return what torch's function of that name returns, but for rounding; NotImplemented for what it must do itself.

    It must for labels that are probabilities, and for classes in another dimension than the last; and for logits of a
    head that has changed since, and while torch checkpoints.
    """
    steps = input.lazy_value.source.steps()
    if size_average is not None or reduce is not None or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    if not 0 <= label_smoothing <= 1 or not _is_ours(input, target, weight):
        return NotImplemented
    if not isinstance(steps.source, HeadSource):
        return _of_labelled(input, target, weight, ignore_index, reduction, label_smoothing)
    if steps.source.is_outdated:
        return NotImplemented
    labelled = (target != ignore_index).nonzero().flatten()
    chosen = None if len(labelled) == len(target) else labelled
    labels = target if chosen is None else target[chosen]
    if len(labels) and not (labels.min() >= 0 and labels.max() < input.shape[-1]):
        return NotImplemented
    differentiable = input.requires_grad and torch.is_grad_enabled()
    if differentiable:
        input.lazy_value.note_taken()
    exact = torch.float64 if input.dtype is torch.float64 else torch.float32
    weight = None if weight is None else weight.to(exact)
    loss = Loss(steps.source, steps.steps, labels, weight, label_smoothing, exact, reduction != "none")
    x = steps.source.input_rows(steps.then(chosen, None).rows)
    if not differentiable:
        x = x.detach()
    dtype = torch.float32 if autocast_dtype(input.device.type) is not None and exact is torch.float32 else input.dtype
    with without_autocast(input.device):
        parameters = steps.source.parameters if differentiable else [p.detach() for p in steps.source.parameters]
        losses: Tensor = _CrossEntropy.apply(loss, x, *parameters)  # type: ignore[no-untyped-call]
        if reduction == "mean":
            losses = losses / (len(labels) if weight is None else weight[labels].sum())
        if reduction == "none" and chosen is not None:
            losses = losses.new_zeros(len(target)).index_copy(0, chosen, losses)
        return losses.to(dtype)


def _is_ours(logits: Tensor, target: Any, weight: Any) -> bool:
    """Whether labels and weights of classes are such as chunks are computed for, in a call that nothing follows."""
    plain = type(target) is Tensor and target.dtype is torch.int64 and target.device == logits.device
    if not plain or logits.dim() != 2 or target.shape != logits.shape[:1]:
        return False
    if weight is not None and (type(weight) is not Tensor or weight.requires_grad or not _fits(weight, logits)):
        return False
    return not (is_watched() or in_backward()) and checkpointing() is None


def _fits(weight: Tensor, logits: Tensor) -> bool:
    """Whether torch's own function takes these weights of classes."""
    cast = autocast_dtype(logits.device.type) is not None
    return weight.shape == logits.shape[-1:] and (cast or weight.dtype is logits.dtype)


class Loss(NamedTuple):
    """What is computed of the rows of a head's input, and how."""

    head: HeadSource
    steps: tuple[Step, ...]
    labels: Tensor
    weight: Tensor | None
    smoothing: float
    dtype: torch.dtype
    """In which logits are exponentiated and summed."""
    summed: bool
    """Whether the sum of the losses is wanted, so that gradients can be made with them; else they are made later."""

    def parts(self) -> Iterator[slice]:
        """Yield the chunks of the rows, all about as long."""
        rows, row_bytes = len(self.labels), self.head.shape[-1] * 4
        return _parts(rows, max(CHUNK_ROWS, CHUNK_BYTES // row_bytes))

    def computed(
        self, x: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool], slopes: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss of each row, and the gradients of x and parameters that are needed.

        Args:
            x: the rows of the head's input that have a label, [n, in].
            parameters: of the head.
            needs: which gradients, first that of x.
            slopes: what the gradient of each row is multiplied by; None: 1.
        """
        losses = x.new_empty(len(x), dtype=self.dtype)
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(parameters, needs[1:], strict=True)]
        gradients = [torch.zeros_like(t) if need else None for t, need in zip((x, *parameters), needs, strict=True)]
        for part in self.parts():
            rows = x[part].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                logits = self.head.function(rows, *leaves)
            with torch.no_grad():
                slope = None if slopes is None else slopes[part]
                losses[part], gradient = self._of_chunk(logits, self.labels[part], slope, any(needs))
            if gradient is not None:
                wanted = [leaf for leaf in (rows, *leaves) if leaf.requires_grad]
                found = iter(torch.autograd.grad(logits, wanted, gradient))
                for number, total in enumerate(gradients):
                    if total is not None:
                        (total if number else total[part]).add_(next(found))
            del logits, gradient  # before the next chunk is made
        return losses, gradients

    def _of_chunk(
        self, made: Tensor, labels: Tensor, slope: Tensor | None, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the losses of a chunk, and the gradient of what the head made, which may be in its memory."""
        widened = all(isinstance(step, Cast) and step.widens(made.dtype) for step in self.steps)
        stepped = leaf = made.detach()
        if not widened:
            leaf.requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                for step in self.steps:
                    stepped = step(stepped)
        logits = stepped.detach().to(self.dtype, copy=not widened)
        losses = logits.new_empty(len(labels))
        most = max(1, _CACHED_BYTES // (logits.shape[1] * 4)) if logits.device.type == "cpu" else len(labels)
        for part in _parts(len(labels), most):
            block, its_labels = logits[part], labels[part]
            losses[part], scale = self._exponentiated(block, its_labels)
            if wants_gradient:
                self._to_gradient(block, its_labels, scale, None if slope is None else slope[part])
        if not wants_gradient:
            return losses, None
        if widened:
            return losses, logits if logits.dtype is made.dtype else leaf.copy_(logits)
        return losses, torch.autograd.grad(stepped, leaf, logits.to(stepped.dtype))[0]

    def _exponentiated(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses, and what each row of the logits, now exponentials in place, is divided by to be p."""
        picked = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        smooth = None
        if self.smoothing:
            smooth = logits.sum(1) if self.weight is None else logits @ self.weight
        largest = logits.amax(1, keepdim=True)
        scale = logits.sub_(largest).exp_().sum(1)
        log_sums = largest.squeeze(1) + scale.log()
        on_label, spread, total = self._weights(labels, logits.shape[1])
        losses = (log_sums - picked) * on_label
        if smooth is not None:
            losses += (log_sums * total - smooth) * spread
        return losses, scale

    def _weights(self, labels: Tensor, classes: int) -> tuple[Tensor | float, float, Tensor | float]:
        """Return (1 - ε) w_y, ε/V and Σ w."""
        on_label: Tensor | float = 1 - self.smoothing
        if self.weight is not None:
            on_label = self.weight[labels] * on_label
        return on_label, self.smoothing / classes, classes if self.weight is None else self.weight.sum()

    def _to_gradient(self, exponentials: Tensor, labels: Tensor, scale: Tensor, slope: Tensor | None) -> None:
        """Turn exponentials of logits into the gradient of the losses, in place."""
        on_label, spread, total = self._weights(labels, exponentials.shape[1])
        times = (on_label + spread * total) / scale
        exponentials.mul_((times if slope is None else times * slope).unsqueeze(1))
        if self.smoothing:
            below = exponentials.new_full((1,), spread) if self.weight is None else self.weight * spread
            exponentials.sub_(below if slope is None else slope.unsqueeze(1) * below)
        places = labels.unsqueeze(1)
        taken = torch.as_tensor(on_label, dtype=self.dtype, device=labels.device).expand(len(labels))
        taken = taken if slope is None else taken * slope
        exponentials.scatter_(1, places, exponentials.gather(1, places) - taken.unsqueeze(1))


def _parts(rows: int, most: int) -> Iterator[slice]:
    """Yield slices of so many rows at the most, all about as long."""
    size = max(1, -(-rows // max(1, -(-rows // max(1, most)))))
    return (slice(start, start + size) for start in range(0, rows, size))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Loss, x: Tensor, *parameters: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        if not loss.summed:
            ctx.loss, ctx.rows = loss, len(x)
            ctx.save_for_backward(x, *parameters)
            return loss.computed(x, parameters, [False] * len(needs))[0]
        losses, gradients = loss.computed(x, parameters, needs)
        ctx.loss, ctx.rows = None, len(x)
        ctx.save_for_backward(*gradients)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RefusedError(
                "gradients of gradients are asked for, through a loss that makes its own without their history",
                advice='apply without "loss" in `optimise`',
            )
        if ctx.loss is not None:
            x, *parameters = ctx.saved_tensors
            with without_autocast(x.device):
                return (None, *ctx.loss.computed(x, parameters, ctx.needs_input_grad[1:], slope)[1])
        gradients = ctx.saved_tensors
        if not ctx.rows:  # a mean of nothing has an infinite slope, and nothing to multiply
            return (None, *gradients)
        return (None, *(None if gradient is None else gradient * slope for gradient in gradients))
