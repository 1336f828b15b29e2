"""What identical blocks have in common."""

import threading
from dataclasses import dataclass, field
from typing import Any

from lora_fx.capture.captured import Captured
from lora_fx.regions.program import Program
from lora_fx.regions.sizes import Sizes


@dataclass(slots=True)
class BlockPrograms:
    """What identical blocks share: their programs, and the calls that could not be captured."""

    passes: tuple[str, ...] = ()
    """Names of what is done to programs to make training cheaper."""
    known: bool = True
    """Whether its graphs are kept for other models, and theirs are used."""
    programs: list[Program] = field(default_factory=list)
    failures: dict[tuple[object, ...], str] = field(default_factory=dict)
    """Reason for each signature of a call that cannot be captured."""
    recalled: dict[int, tuple[Captured, Program | None]] = field(default_factory=dict)
    """Graphs of other models, by their ids, and their programs until these are used or found wrong."""
    split: "dict[tuple[Any, ...], BlockPrograms]" = field(default_factory=dict)
    """The same of blocks whose layers processes share, by how they share them."""
    sizes: Sizes = field(default_factory=Sizes)
    seconds: float = 0.0
    """Time spent capturing and checking."""
    lock: Any = field(default_factory=threading.Lock)
    warned: bool = False
    """Whether it was said that torch.compile cannot make code for them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "BlockPrograms":
        return self  # programs do not change; a copy of the model runs the same ones

    def __reduce__(self) -> tuple[Any, ...]:
        # the next process captures code itself, with its torch and its classes
        return (BlockPrograms, (self.passes,))
