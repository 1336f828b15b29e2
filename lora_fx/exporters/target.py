"""What every export target is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

Refusal = tuple[str, str]
"""(path of the site, why the target cannot express it and what the nearest exact way is)."""


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
    """(tuned, path, **options) writes the adapted model to the path, atomically; the model stays unchanged."""
    verify: Callable[..., float] | None = None
    """(tuned, path, sample) loads what was written in the client, in a subprocess, and returns max |Δ| of the outputs."""
    extra: str = ""
    """The extra of lora-fx that installs what writing (and verifying) needs."""
    expresses: dict[str, str] = field(default_factory=dict)
    """For the table of capabilities: "yes", "exact equivalent" or "refused", by feature (see exporters.FEATURES)."""
    options: dict[str, str] = field(default_factory=dict)
    """Keyword arguments that `write` takes, with a sentence about each."""
    tolerance: float = 1e-5
    """Above which max |Δ| is a failure, for a float32 model."""


Options = dict[str, Any]
Written = Path
