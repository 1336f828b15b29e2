"""What torch does with the tensors that autograd keeps: hooks that offload or recompute them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_fx.models.torch_internals import saved_tensor_hooks

Pack = Callable[..., Any]


def packing() -> Pack | None:
    """Return the innermost hook that is given every tensor that autograd keeps now; None if there is none."""
    hooks = saved_tensor_hooks(False)
    return None if hooks is None else hooks[0]


def checkpointing() -> Pack | None:
    """Return the hook of the checkpoint that is at work; each has its own.  None outside, and in a reentrant one."""
    pack = packing()
    return pack if pack is not None and pack.__module__ == "torch.utils.checkpoint" else None
