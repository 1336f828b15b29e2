"""How the first values of A and B are made, by name; what each scheme needs and does is stated here alone."""

import functools
import re

FRESH = ("kaiming", "gaussian", "orthogonal", "random")
"""Drawn, without a look at the weight."""
DECOMPOSED = ("pissa", "olora")
"""Parts of the weight; besides, `FAST_PISSA`."""
FROM_INPUTS = ("eva", "corda", "corda_kpm")
"""Made from what the layer is given on data."""
FROM_DATA = (*FROM_INPUTS, "lora_ga", "loftq")
"""Made from more than the weight: data, or the weight before it was quantised."""
INITS = (*FRESH, *DECOMPOSED, *FROM_DATA)
FAST_PISSA = r"^pissa_niter_[1-9][0-9]?$"
"""PiSSA by a randomised SVD with so many subspace iterations."""
OF_FILES = ("kasa",)
"""No rule says these: files of PEFT's were trained so.  kasa: without the smallest singular parts of the weight."""
_MOVED = (*DECOMPOSED, *OF_FILES, "corda", "corda_kpm", "lora_ga")


def is_init(name: object) -> bool:
    """Whether there is a scheme of that name."""
    return isinstance(name, str) and (name in INITS or re.fullmatch(FAST_PISSA, name) is not None)


def is_noted(name: object) -> bool:
    """Whether an adapter can have started so: by a scheme, or in a file of PEFT's."""
    return is_init(name) or name in OF_FILES


@functools.cache
def iterations_of(init: str) -> int | None:
    """Return the subspace iterations of a fast PiSSA; None for any other scheme.

    >>> iterations_of("pissa_niter_16"), iterations_of("pissa")
    (16, None)
    """
    return int(init.rpartition("_")[2]) if re.fullmatch(FAST_PISSA, init) else None


@functools.cache
def is_moved(init: str) -> bool:
    """Whether A and B start at A₀ and B₀ ≠ 0, and scaling · B₀ A₀ is taken away: the model starts at its base."""
    return init in _MOVED or iterations_of(init) is not None


def pairs_of(init: str) -> int:
    """Return of how many pairs of factors the product is made: B A, and where it is moved B₀ A₀."""
    return 2 if is_moved(init) else 1


def ranks_needed(init: str, r: int) -> int:
    """Return how many singular values a weight must have for a scheme with rank r."""
    return 0 if init in FRESH else 2 * r if init == "lora_ga" else r
