"""DoRA: each output of W + scaling · B A keeps a length of its own, which is trained.

W' = m · V / ‖V‖, V = W + scaling · B A, with m [out] and ‖·‖ the 2-norm of each row of V [out, in].  A row is a
convolution's whole filter, an embedding's dimension over all tokens.
Source: Liu et al. 2024, arXiv:2402.09353, §4.1 eq. 5; the norm counts as a constant for gradients, §4.3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.factors.kinds import ConvolutionA
from lora_fx.adapters.factors.lora import LoRAFactor, as_rows, low_rank_weight, wide_sum
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.errors import RefusedError
from lora_fx.models.quantised import dense


class DoRAMagnitude(nn.Module):
    """The lengths m: `lora_magnitude_vector.<adapter>.weight` [out].

    Where parts of a weight are adapted, it has the rows of these one after another, and all other outputs stay as they
    are.
    """

    rows: Tensor | None

    def __init__(self, weight: Tensor, scaling: float, parts: tuple[tuple[int, ...], ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.scaling = scaling
        rows = torch.tensor([row for part in parts for row in part], device=weight.device) if parts else None
        self.register_buffer("rows", rows, persistent=False)

    def forward(
        self,
        base: Tensor,
        delta: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        onto: Tensor | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """Return m/‖V‖ · (W x + delta) + bias, given base = W x + bias and delta = scaling · B A x, [.., out].

        Written so that it equals `base` bit by bit while B A = 0 and m = ‖W‖.  Dropout reaches `delta` alone.  Beside
        other adapters, `share` times what it adds to `base` is added to what they have made of it, `onto`.
        """
        scale = self.scale(weight, lora_A, lora_B)
        plain = base if bias is None else base - bias
        more = (scale - 1).to(base.dtype) * plain
        if onto is None:
            return base + more + scale.to(base.dtype) * delta
        return onto + share * (more + scale.to(base.dtype) * delta)

    def scale(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return m/‖V‖ [out] for a weight [out, in]; all three may be a convolution's, [out, in, kernel…]."""
        rows = dense(weight).flatten(1)
        norms = self.norms(rows, lora_A.flatten(1), lora_B.flatten(1))
        return self._of_all(stretch(self.weight.flatten(), norms), len(rows))

    def norms(self, rows: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return ‖V‖ of the outputs that have a length, without gradient, of W, A and B as matrices."""
        return row_norms_factored(self._own(rows), lora_A, self._own(lora_B), self.scaling)

    def stored(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, layout: str) -> Tensor:
        """Return m · V / ‖V‖ in W's dtype and as W is stored, through which gradients reach m, A and B.

        It is what the outputs of one-hot inputs become; bit-equal to W while B A = 0 and m = ‖W‖.
        """
        rows = as_rows(weight.flatten(1), layout)
        delta = low_rank_weight(lora_A.flatten(1), lora_B.flatten(1), self.scaling).to(weight.dtype)
        columns = DoRAMagnitude.forward(self, rows.t(), delta.t(), rows, None, lora_A, lora_B)
        whole: Tensor = as_rows(columns.t(), layout)
        return whole.reshape(weight.shape)

    def merged(self, rows: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """Return m · V / ‖V‖ for W [out, in], in W's dtype, a new tensor; accumulated in float32 and rounded once."""
        directions = wide_sum(rows, low_rank_weight(lora_A, lora_B, self.scaling))
        norms = torch.linalg.vector_norm(self._own(directions), dim=1)
        scale = stretch(self.weight.flatten().to(directions.dtype), norms)
        return (directions * self._of_all(scale, len(directions)).unsqueeze(1)).to(rows.dtype)

    def of_all(self, weight: Tensor, rows: Tensor) -> Tensor:
        """Return the lengths of all outputs of W [out, in]: the trained ones of these rows, else the base's own."""
        wide = torch.promote_types(torch.float32, self.weight.dtype)
        norms = torch.linalg.vector_norm(dense(weight).to(self.weight.device, wide), dim=1)
        lengths: Tensor = norms.to(self.weight.dtype)
        return lengths.index_put((rows,), self.weight.detach())

    def taken(self, lengths: Tensor) -> Tensor:
        """Return its own of the lengths of all outputs, in the shape of `weight`."""
        if self.rows is None:
            return lengths.reshape(self.weight.shape)
        return lengths.flatten().to(self.rows.device)[self.rows]

    def _own(self, rows: Tensor) -> Tensor:
        """Return the rows of a matrix that belong to outputs with a length."""
        return rows if self.rows is None else rows[self.rows]

    def _of_all(self, scale: Tensor, outputs: int) -> Tensor:
        """Return a scale for every output: 1 for those without a length."""
        return scale if self.rows is None else scale.new_ones(outputs).index_put((self.rows,), scale)

    def reset_parameters(self) -> None:
        """Raise RefusedError: the first lengths are those of the weight's rows."""
        raise RefusedError(
            "a DoRA magnitude has no first values without its weight",
            advice="adapt a model with values, or load the values of an adapter",
        )

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}"


class ConvolutionMagnitude(DoRAMagnitude):
    """The lengths of a convolution's filters, in the shape that PEFT gives them: [1, out, 1…]."""

    def forward(self, base: Tensor, delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the same for outputs [.., out, …]."""
        channels = 1 - self.weight.dim()
        if kwargs.get("onto") is not None:
            kwargs["onto"] = kwargs["onto"].movedim(channels, -1)
        outputs = super().forward(base.movedim(channels, -1), delta.movedim(channels, -1), *args, **kwargs)
        return outputs.movedim(-1, channels)


class WeightMagnitude(DoRAMagnitude):
    """The lengths of a raw parameter's outputs; it makes the whole weight."""

    def __init__(self, weight: Tensor, scaling: float, parts: tuple[tuple[int, ...], ...], layout: str) -> None:
        super().__init__(weight, scaling, parts)
        self.layout = layout

    def forward(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:  # type: ignore[override]
        """Return m · V / ‖V‖ as the weight is stored."""
        return self.stored(weight, lora_A, lora_B, self.layout)


def fresh_magnitude(weight: Tensor, lora_A: LoRAFactor, lora_B: LoRAFactor, spec: AdapterSpec) -> DoRAMagnitude:
    """Return the lengths that V has now, in the dtype and on the device of the factors.

    Args:
        weight: W as it is stored, where the factors are.
        lora_A: of the adapter, as is `lora_B`.
        spec: of the adapter.
    """
    number = sum(map(len, spec.parts)) or spec.site.features[0]
    empty = lora_A.weight.detach().new_zeros(number)
    made: DoRAMagnitude
    if isinstance(lora_A, ConvolutionA):
        made = ConvolutionMagnitude(empty.view(1, number, *(1 for _ in weight.shape[2:])), spec.scaling)
    elif spec.path_is_owner:
        made = DoRAMagnitude(empty, spec.scaling, spec.parts)
    else:
        made = WeightMagnitude(empty, spec.scaling, spec.parts, spec.site.layout)
    rows = dense(as_rows(weight, spec.site.layout)).flatten(1)
    with torch.no_grad():
        made.weight.copy_(made.norms(rows, lora_A.matrix, lora_B.matrix).view_as(made.weight))
    return made


def stretch(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return m/‖V‖ in m's dtype; 0 rather than 0/0 for a row of zeros, which stays one."""
    norms = norms.to(magnitude.dtype)
    return magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def row_norms_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ‖W + scaling · B A‖ for each row, [out], without gradient, and without the sum as a whole.

    ‖V‖² = ‖W‖² + 2 scaling · Σ (W Aᵀ ⊙ B) + scaling² · Σ (B (A Aᵀ) ⊙ B), each Σ over a row.  For B A = 0 it is ‖W‖,
    bit by bit.  Where V nearly cancels W, it is as exact as W's own length; it is never so small that it is nothing but
    rounding, and in particular not 0 then.
    """
    with torch.no_grad():
        wide = torch.promote_types(torch.float32, lora_A.dtype)
        W, A, B = dense(weight).to(wide), lora_A.to(wide), lora_B.to(wide)
        lengths: Tensor = torch.linalg.vector_norm(W, dim=1)
        cross = ((W @ A.t()) * B).sum(1).mul_(2 * scaling)
        added = ((B @ (A @ A.t())) * B).sum(1).mul_(scaling * scaling).add_(cross)
        grown = lengths * (1 + added / lengths.square()).clamp_(min=torch.finfo(wide).eps).sqrt_()
        return torch.where(lengths > 0, grown, added.clamp(min=0).sqrt_())
