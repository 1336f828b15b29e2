"""Dropout that is nearly free: which entries are kept follows from a seed, so that no mask is stored.

Entry (i, j) is kept where a byte of a hash of (seed, i, j) is at least 256 p; where a byte cannot come within 2 % of p
and of 1 - p, two bytes are.  Entries are kept independently of each other with the probability that `keeping` gives,
and the scale is 1 over it, so that the mean of what is dropped out is what came in, exactly.

The hash is splitmix64 of the row plus splitmix64 of the column, mixed once more (Steele, Lea, Flood 2014,
doi:10.1145/2660193.2660195); integer arithmetic wraps alike on every device, so a seed gives the same mask on all.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_fx.models.torch_internals import checkpointing, in_backward


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_NEAR = 0.02
"""How far, relatively, the probabilities of dropping and keeping may be from what was asked for, for one byte to do."""


def bits_for(p: float) -> int:
    """Return how many random bits decide on an entry that is dropped with probability p: 8 or 16."""
    return 8 if abs(round(256 * p) / 256 - p) <= _NEAR * min(p, 1 - p) else 16


def keeping(p: float) -> float:
    """Return the probability with which an entry is kept: 1 - p, to 8 or 16 bits."""
    steps: int = 1 << bits_for(p)
    return 1 - round(steps * p) / steps


def is_possible(p: float) -> bool:
    """Whether there is a mask for this probability: not for one so near to 1 that nothing is kept."""
    return keeping(p) > 0


def new_seed(x: Tensor) -> Tensor:
    """Return a fresh seed from the generator of x's device, without waiting for the device."""
    return torch.empty((), dtype=torch.int64, device=x.device).random_()


class _Latest(threading.local):
    """The input that was dropped out last by layers that share, its seed, and who has used that."""

    x: weakref.ref[Tensor] | None = None
    checkpoint: weakref.ref[Callable[..., Any]] | None = None
    version = 0
    p = 0.0
    seed: Tensor
    users: frozenset[int] = frozenset()


_LATEST = _Latest()


def shared_seed(x: Tensor, p: float, user: int) -> Tensor:
    """Return the seed of the layer that met this very x before; a fresh one if there is none, or for its second turn.

    Args:
        x: the input; an unchanged one, for an old seed.
        p: the probability of dropout, which must be the same too.
        user: which layer asks: each uses a seed once, so a model that is run again on the same tensor draws new masks.
    """
    latest, pack = _LATEST, checkpointing()
    checkpoint = None if pack is None else weakref.ref(pack)  # what it runs again must draw what it drew
    if not torch.is_grad_enabled() or (checkpoint is None and in_backward()):
        return new_seed(x)  # a reentrant checkpoint runs it without gradients, and again in the backward pass
    same = latest.x is not None and latest.x() is x and latest.version == x._version and latest.p == p
    if not same or user in latest.users or latest.checkpoint != checkpoint:
        latest.x, latest.version, latest.p, latest.checkpoint = weakref.ref(x), x._version, p, checkpoint
        latest.seed, latest.users = new_seed(x), frozenset()
    latest.users |= {user}
    return latest.seed


def kept(seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """Return the mask [rows, columns] of ones, which are kept, and zeros; `seed` is a scalar int64 tensor."""
    return next(mask for _, mask in _parts(seed, rows, columns, p, dtype, max(rows, 1)))


def kept_in_parts(
    seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the mask by parts, (which rows, mask of these), small enough for a processor to keep at hand.

    Other devices get it in one part: there a call costs more than memory.
    """
    step = max(_FEWEST, _ENTRIES // max(columns, 1)) if seed.device.type == "cpu" else max(rows, 1)
    return _parts(seed, rows, columns, p, dtype, step)


_ENTRIES, _FEWEST = 1 << 20, 64
"""Entries of a part, and the rows that it has at least: measured; smaller parts cost more calls than they save."""


def _parts(
    seed: Tensor, rows: int, columns: int, p: float, dtype: torch.dtype, step: int
) -> Iterator[tuple[slice, Tensor]]:
    if not rows:
        yield slice(0, 0), torch.ones((0, columns), dtype=dtype, device=seed.device)
        return
    bits = bits_for(p)
    threshold = round((1 << bits) * p) - (1 << (bits - 1))  # of signed numbers
    words = -(-columns * bits // 64)
    sides = _mixed(torch.arange(1, rows + words + 1, device=seed.device).add_(seed).mul_(_GOLDEN))
    left, right = sides[:rows].unsqueeze(1), sides[rows:]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        mixed = left[part] + right
        mixed.bitwise_xor_(_shifted(mixed, 32)).mul_(_FIRST).bitwise_xor_(_shifted(mixed, 29))
        drawn = mixed.view(torch.int8 if bits == 8 else torch.int16)[:, :columns]
        yield part, torch.ge(drawn, threshold, out=drawn).to(dtype)


def _mixed(words: Tensor) -> Tensor:
    words.bitwise_xor_(_shifted(words, 30)).mul_(_FIRST)
    words.bitwise_xor_(_shifted(words, 27)).mul_(_SECOND)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Return the words shifted to the right with zeros coming in: torch's own shift brings in the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
