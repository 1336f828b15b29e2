"""‖ΔW‖ of adapters without the product B A.

‖B A‖² = Σ (A Aᵀ) ∘ (Bᵀ B), a sum over r × r products, in float64.  Its rounding is at most about 1e-8 · ‖A‖ ‖B‖ in
‖B A‖, which is nothing unless the columns of B A cancel each other; `lora_fx.deltas` has no such limit.
"""

from torch import Tensor

from lora_fx.adapters.attach import Attached
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.models.shards import is_sharded, whole
from lora_fx.models.tensors import borrowed


def wide_matrices(adapter: Attached) -> tuple[Tensor, Tensor]:
    """Return B and A as plain matrices in float64, gathered where they are sharded."""
    return _wide(_whole(adapter.lora_B)), _wide(_whole(adapter.lora_A))


def _whole(factor: LoRAFactor) -> Tensor:
    if not is_sharded(factor.weight):
        return factor.matrix.detach()
    with borrowed(factor, {"weight": whole(factor.weight)}):
        return factor.matrix.detach()


def _wide(matrix: Tensor) -> Tensor:
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # Apple's GPUs know no float64


def product_square(B: Tensor, A: Tensor) -> Tensor:
    """Return ‖B A‖², Frobenius, without B A; of a bank the sum over its members.

    Args:
        B: [.., out, r].
        A: [.., r, in].
    """
    return ((A @ A.transpose(-1, -2)) * (B.transpose(-1, -2) @ B)).sum()
