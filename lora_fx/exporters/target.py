"""What every export target is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

Refusal = tuple[str, str]
"""(path of the site, why the target cannot express it and what the nearest exact way is)."""
Ability = Literal["yes", "exact equivalent", "refused"]

FEATURES = {
    "linear": "`nn.Linear`",
    "conv1d": "transformers' `Conv1D`",
    "convolution": "convolutions",
    "embedding": "embeddings",
    "attention": "`in_proj_weight` of `nn.MultiheadAttention`",
    "parameter": "raw parameters",
    "experts": "banks of experts",
    "slices": "parts of a fused weight",
    "calls": "one adapter for each call of a module",
    "ranks": "several ranks",
    "alphas": "several scalings",
    "rslora": "rank-stabilised LoRA",
    "dora": "DoRA",
    "bias": "trained biases",
    "train": "modules trained whole (`train:`)",
    "adapters": "several named adapters",
}
"""What an adapted model may have that a target can express or not; each target says of all of them."""


@dataclass(frozen=True, slots=True)
class Target:
    """One format that adapters, or adapted models, are written in."""

    name: str
    """What users call it: `gguf`."""
    writes: str
    """What is written, in a few words: `one file`, `a directory`."""
    client: str
    """The program that reads it: `llama.cpp`."""
    refused: Callable[[nn.Module], Iterator[Refusal]]
    """Yields what of an adapted model the target cannot express exactly; nothing is written if there is any."""
    write: Callable[..., None]
    """(tuned, path, **options) writes the model to the path, with what belongs to it beside; the model stays unchanged.

    The path is in a fresh directory: what was written moves to where the user wants it when all of it is there, and
    verified, under the same names.  With `needs_sample` it gets the keyword `sample` too.
    """
    verify: Callable[..., float] | None = None
    """(tuned, path, sample) loads what was written in the client, in a subprocess, and returns max |Δ| of the outputs.

    The model is in eval mode.  Where the client can switch the adapter off, the base's outputs are compared as well.
    """
    extra: str = ""
    """The extra of lora-fx that installs what writing (and verifying) needs."""
    needs: tuple[str, ...] = ()
    """Modules, as they are imported, that writing needs."""
    verify_needs: tuple[str, ...] = ()
    """Modules that verifying needs besides."""
    needs_sample: bool = False
    """Whether writing needs a sample of inputs; `verify` always does."""
    expresses: dict[str, Ability] = field(default_factory=dict)
    """For the table of capabilities: of each of FEATURES, whether it is written, and how."""
    options: dict[str, str] = field(default_factory=dict)
    """Keyword arguments that `write` takes, with a sentence about each."""
    verify_options: tuple[str, ...] = ()
    """Those of them that `verify` takes too."""
    tolerance: float = 1e-5
    """Above which max |Δ| is a failure, for a float32 model whose outputs are of order one."""
