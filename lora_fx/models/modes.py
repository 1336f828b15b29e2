"""`torch.inference_mode`: autograd takes nothing that was made in it, so nothing of ours is made there."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.progress.steps import ShowProgress, running


@contextlib.contextmanager
def normal_tensors() -> Iterator[None]:
    """Return a context in which what is made can be trained, also where the caller is in inference mode."""
    # one way out: nothing runs of what an interruption could end after the change that was made inside
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def making(name: str, progress: ShowProgress, total: int | None = 1) -> Iterator[None]:
    """Return a context for a call that makes tensors, and tells its steps as `running` does."""
    with normal_tensors(), running(name, progress, total):
        yield


def normal(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or, of a plain one that was made in inference mode, a normal one on the same memory."""
    if not tensor.is_inference():
        return tensor
    with normal_tensors():
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
