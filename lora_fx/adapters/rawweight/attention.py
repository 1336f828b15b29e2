"""torch's own attention function, for weights that are more than tensors."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F


def attention_forward(*args: Any, **kwargs: Any) -> Any:
    """Return what `F.multi_head_attention_forward` returns; its linears see the weights as they are given.

    torch's function hands over to the first argument that is more than a tensor, before it does anything.  Here the
    same code runs with that question answered by no: the projections inside of it then meet the adapted weights one by
    one, as `F.linear` or as slices for q, k and v.
    """
    code = F.multi_head_attention_forward.__code__
    scope = {**vars(F), "has_torch_function": _nobody}
    own = FunctionType(code, scope, code.co_name, F.multi_head_attention_forward.__defaults__)
    return own(*args, **kwargs)


def _nobody(_: object) -> bool:
    return False
