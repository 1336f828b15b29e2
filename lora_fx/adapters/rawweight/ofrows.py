"""What a module shows as its weight while each row of a batch has an adapter of its own: its form, and no values."""

from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.rawweight.weight import FACTS, called_name
from lora_fx.errors import RefusedError
from lora_fx.models.torch_internals import DisableTorchFunctionSubclass, tensor_without_memory


class WeightOfRows(Tensor):
    """A weight that is another one for each row: forwards may ask its dtype or shape, and compute nothing with it."""

    base: Tensor
    refusal: RefusedError

    @staticmethod
    def of(base: Tensor, refusal: RefusedError) -> "WeightOfRows":
        """Return what stands for the weight; whatever is more than a question about its form raises the refusal."""
        made: WeightOfRows = tensor_without_memory(
            WeightOfRows, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        made.__dict__.update(base=base, refusal=refusal)
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = called_name(func)
        with DisableTorchFunctionSubclass():
            if name == "is_leaf":
                return False
            if name in FACTS or name == "requires_grad":
                return func(*(one.__dict__["base"] if isinstance(one, cls) else one for one in args), **(kwargs or {}))
        raise _refusal((*args, *(kwargs or {}).values()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise _refusal((*args, *(kwargs or {}).values()))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightOfRows({tuple(self.__dict__['base'].shape)})"


def _refusal(values: tuple[Any, ...]) -> RefusedError:
    found = (one.__dict__.get("refusal") for one in values if isinstance(one, WeightOfRows))
    return next((one for one in found if one is not None), RefusedError("a weight that is another one for each row"))
