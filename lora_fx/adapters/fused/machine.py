"""What matrix products cost on a machine: five numbers, and the small file in the user's cache that keeps them.

`lora-fx bench --calibrate` measures them; `contraction` uses them.  No torch here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lora_fx.errors import LoraFxWarning

Contraction = Literal["factored", "merged"]
VARIABLE = "LORA_FX_MACHINE"
_VERSION = 1
_CPUS = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Products:
    """A linear layer with an adapter, as the sizes of its products."""

    inputs: int
    """m."""
    outputs: int
    """n."""
    rank: int
    """r."""
    itemsize: int = 4
    """Bytes of a number."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What products cost; all in seconds, but for `knee`.

    A wide product takes `wide` for each FLOP; one with r rows takes wide · (1 + knee / r), as it reads much for little
    work; adding a product of rank r to a matrix in place takes `wide`, and `traffic` for reading and writing the
    matrix; and every product takes `call`.
    """

    wide: float
    """For each FLOP; a multiplication with its addition is two."""
    knee: float
    """Rank at which a thin product takes twice the time of a wide one for each FLOP."""
    traffic: float
    """For each byte that is read or written."""
    fresh: float
    """For each byte of a tensor that is made: finding the memory, and filling it the first time."""
    call: float
    """For each product."""

    def seconds(self, rows: int, site: Products, contraction: Contraction) -> float:
        """Return the predicted time of a step, with the gradients of the input and of both factors.

        Both contractions take two products with the weight, and the four thin ones h = A xᵀ, z = Bᵀ dyᵀ, h dy and z x.
        The factored one then adds rank r to y [N, n] and to dx [N, m]; the merged one adds it twice to W [n, m], each
        time in a new tensor.

        Args:
            rows: N, the tokens of a call.
            site: the layer.
            contraction: see `contraction`.
        """
        m, n = site.inputs, site.outputs
        thin = 2 * self._thin(rows * (m + n), site.rank)
        base = 4 * rows * m * n * self.wide + 8 * self.call + thin
        if contraction == "factored":
            return base + self._added(rows * (m + n), site)
        return base + 2 * (self._added(m * n, site) + m * n * site.itemsize * self.fresh)

    def _thin(self, numbers: int, rank: int) -> float:
        """Return the time of r rows' products with a matrix of so many numbers."""
        return 2 * numbers * (rank + self.knee) * self.wide

    def _added(self, numbers: int, site: Products) -> float:
        """Return the time of adding a product of rank r to so many numbers."""
        return numbers * 2 * (site.rank * self.wide + site.itemsize * self.traffic)


Key = tuple[str, str, int]
"""Name of the device, dtype, number of threads."""


def device_name(kind: str) -> str:
    """Return the name of a device of a type (`cpu`, `cuda`): what a calibration is good for."""
    if kind == "cpu":
        lines = _CPUS.read_text(encoding="utf-8").splitlines() if _CPUS.exists() else []
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return next(named, platform.processor() or platform.machine())
    if kind == "cuda":
        from torch.cuda import get_device_name

        return get_device_name()
    return kind


@functools.cache
def calibrated(kind: str, dtype: str, threads: int) -> Machine | None:
    """Return what was measured for a type of device, a dtype and a number of threads; None if nothing was.

    The file is read once in a process.
    """
    known = _known()
    return known.get((device_name(kind), dtype, threads)) if known else None


@functools.cache
def _known() -> Mapping[Key, Machine]:
    return read(path())


def forget() -> None:
    """Let the file be read again."""
    calibrated.cache_clear()
    _known.cache_clear()


# -- the file


def path() -> Path:
    """Return where calibrations are kept: LORA_FX_MACHINE, or `lora_fx/machine.json` in the user's cache."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lora_fx" / "machine.json"


def read(file: Path) -> dict[Key, Machine]:
    """Return the calibrations of a file; none, with a LoraFxWarning, if it is damaged."""
    try:
        return dict(_parsed(json.loads(file.read_bytes())))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as problem:
        warnings.warn(
            f"{file} is no calibration of lora_fx and is ignored ({problem}); lora-fx bench --calibrate writes it anew",
            LoraFxWarning,
            stacklevel=2,
        )
        return {}


def _parsed(data: Any) -> Iterator[tuple[Key, Machine]]:
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']!r}")
    for each in data["machines"]:
        numbers = [float(each[field.name]) for field in fields(Machine)]
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or not numbers[0]:
            raise ValueError(f"{numbers} are no times")
        yield (str(each["device"]), str(each["dtype"]), int(each["threads"])), Machine(*numbers)


def write(file: Path, found: Mapping[Key, Machine]) -> None:
    """Write calibrations beside those for other keys that the file holds; it is complete at any time."""
    known = {**read(file), **found}
    rows = [
        {"device": device, "dtype": dtype, "threads": threads, **asdict(machine)}
        for (device, dtype, threads), machine in sorted(known.items())
    ]
    text = json.dumps({"version": _VERSION, "machines": rows}, indent=2) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
