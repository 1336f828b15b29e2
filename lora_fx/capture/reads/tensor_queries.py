"""What Python may learn of a tensor during a capture, and which guard makes it safe to rely on."""

import enum
from typing import Any


class TensorQuery(enum.Enum):
    GUARDED = "covered by the guards on sizes, dtypes and devices"
    REQUIRES_GRAD = "needs a guard on requires_grad"
    LAYOUT = "needs a guard on strides"
    UNKNOWN = "nothing covers it"


_GUARDED = frozenset(
    {
        "shape", "size", "dim", "ndim", "ndimension", "__len__", "numel", "nelement", "sym_size", "sym_numel",
        "dtype", "device", "layout", "itemsize", "element_size", "nbytes", "is_floating_point", "is_complex",
        "is_signed", "get_device", "is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_quantized", "is_sparse",
        "is_nested", "is_mkldnn", "type", "result_type", "can_cast", "promote_types", "is_tensor", "names",
        "is_conj", "is_neg", "broadcast_shapes", "__hash__", "__format__",
    }
)  # fmt: skip
POINTERS = frozenset({"data_ptr", "storage", "untyped_storage", "numpy", "__array__", "tolist"})
"""What a fake tensor does not have, and what would be another one at the next call."""
_LAYOUT = frozenset({"stride", "is_contiguous", "storage_offset", "is_non_overlapping_and_dense"})


def kind_of_query(func: Any, name: str) -> TensorQuery:
    """Return which guard covers the plain value that calling `func` gave."""
    if name == "__get__":
        name = func.__self__.__name__
    if name == "requires_grad":
        return TensorQuery.REQUIRES_GRAD
    if name in _LAYOUT:
        return TensorQuery.LAYOUT
    is_arithmetic_on_sizes = name.startswith("sym_")
    return TensorQuery.GUARDED if is_arithmetic_on_sizes or name in _GUARDED else TensorQuery.UNKNOWN
