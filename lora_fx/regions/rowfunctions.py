"""Which torch functions, called outside of blocks on hidden states [batch, tokens, features], treat rows apart."""

from collections.abc import Sequence
from typing import Any

from lora_fx.adapters.rawweight.products import name_of
from lora_fx.passes.pointwise import DUNDERS
from lora_fx.passes.rowwise import ENTRY_BY_ENTRY

HAVE_WEIGHTS = ("linear", "layer_norm", "rms_norm")
"""Of these, all tensors but the first are the same for all rows."""
_ALONG_LAST = frozenset({"mean", "softmax", "log_softmax"})


def row_function(function: Any) -> str:
    """Return the name of a torch function, alike for functions, methods and operators."""
    name = name_of(function)
    return "getitem" if name == "__getitem__" else DUNDERS.get(name, name)


def keeps_rows(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function draws nothing, and makes each row of its result of the same row of its operands alone."""
    if name in ENTRY_BY_ENTRY:
        return name != "dropout"
    if name in _ALONG_LAST:
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        keeps = name != "mean" or kwargs.get("keepdim", args[2] if len(args) > 2 else False)
        return bool(keeps) and dim in (-1, 2, [-1], [2], (-1,), (2,))
    if name in ("layer_norm", "rms_norm"):
        return len(args[1] if len(args) > 1 else kwargs["normalized_shape"]) == 1
    return name == "linear"


def is_all(place: Any) -> bool:
    """Whether an index takes everything along its dimension."""
    return isinstance(place, slice) and place in (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))
