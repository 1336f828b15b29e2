"""A file whose values a swap has copied: while it, the base and the adapter are what they were, it is not read anew.

Its hash, its configuration and its header have been checked; its values are still a map of it.
"""

import os
import time
from collections.abc import Sequence
from operator import is_

from torch import Tensor, nn

from lora_fx.files.adapter.folder import file_in, folder_of
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE
from lora_fx.files.fingerprint import SampledWeights
from lora_fx.models.together import Alike
from lora_fx.models.torch_internals import kinds_checked
from lora_fx.models.walking import weights_of
from lora_fx.sources.regular import UnreadableError, open_regular

Stamp = tuple[int, ...]
MOST_FILES = 4
"""Whose maps are kept: each is a file that is open."""
_SETTLED = 2_000_000_000
"""Nanoseconds: how coarse the times of a file may be.  What was written since could have the same."""


def stamp_of(folder: str | os.PathLike[str]) -> Stamp | None:
    """Return what tells the files of an adapter from others, and from what they are once they are written to.

    None where that is not sure: they have just been written, are not there, or the system lets nobody replace a file
    that is open.
    """
    root, found = folder_of(folder), list[int]()
    if os.name == "nt":
        return None
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        try:
            with open_regular(file_in(root, name)) as file:
                status = os.fstat(file.fileno())
        except (OSError, UnreadableError):
            return None
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _SETTLED:
            return None
        found += (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return tuple(found)


class KeptFile:
    """What was copied of a file into an adapter, value by value as it lies there."""

    def __init__(self, targets: list[Tensor], values: list[Tensor], homes: Sequence[nn.Module], alike: Alike) -> None:
        self._targets, self._values, self._homes, self._alike = targets, values, homes, alike
        self._weights = [weight for weight in weights_of(homes) if weight is not None]
        self._weights_hold = kinds_checked(self._weights)
        self._samples = SampledWeights(self._weights)
        self._sampled = self._samples.values()

    @classmethod
    def of(cls, copies: Sequence[tuple[Tensor, Tensor]], homes: Sequence[nn.Module]) -> "KeptFile | None":
        """Return a file that may be kept: its values are copied as they are."""
        targets, values = [target for target, _ in copies], [value for _, value in copies]
        alike = Alike.of(targets, values)
        return None if alike is None else cls(targets, values, homes, alike)

    def copies(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return the tensors of the adapter and the values for them; None if these or the base may be others now."""
        if not all(map(is_, weights_of(self._homes), self._weights)) or not self._weights_hold(self._weights):
            return None
        if self._samples.values() != self._sampled or not self._alike.holds(self._targets, self._values):
            return None
        return self._targets, self._values
