"""Samples made up from a user's: what a model that is given the one will sooner or later be given too.

Few sizes, sizes of one, an optional tensor left out, a mask with padding.  They show which sizes are really free, and
let the graphs for such calls be captured and proven before training starts instead of in the middle of it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import flatten, rebuild
from lora_fx.models.samples import Sample
from lora_fx.models.swap import original_class

_FEW = 2
_SHORT = 5


def variants(model: nn.Module, sample: Sample) -> Iterator[Sample]:
    """Yield samples like the given one; some of them the model may refuse."""
    sizes = _sizes_of(sample)
    if sizes is None:
        return
    short = sizes.shorter()
    yield from _incomplete(model, sizes.resized(sample, sizes.few(), short))
    for rows in (sizes.few(), 1):
        for lengths in (short, *_with_ones(short)):
            yield from _masked(sizes.resized(sample, rows, lengths))


def shrunk(sample: Sample) -> Sample:
    """Return the sample with few rows and short sequences; itself where its sizes tell nothing."""
    sizes = _sizes_of(sample)
    return sample if sizes is None else sizes.resized(sample, sizes.few(), sizes.shorter())


def _with_ones(lengths: dict[int, int]) -> Iterator[dict[int, int]]:
    """Yield the lengths with each of them 1, and with all of them 1."""
    if len(lengths) > 1:
        yield from ({**lengths, length: 1} for length in lengths)
    if lengths:
        yield dict.fromkeys(lengths, 1)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the first two dimensions of a sample's tensors mean, as far as it shows."""

    batch: int
    lengths: frozenset[int]
    """Second dimensions that are lengths of sequences."""

    def few(self) -> int:
        """Return a small number of rows, at least 2."""
        return min(self.batch, _FEW) if self.batch > 1 else _FEW

    def shorter(self) -> dict[int, int]:
        """Return a small length for each, other than it: at least 2, and other lengths stay other lengths."""
        longest = max(self.lengths, default=0)
        cut = max(0, longest - _SHORT)
        return {length: max(2, length - max(1, cut)) for length in self.lengths}

    def resized(self, sample: Sample, batch: int, lengths: dict[int, int]) -> Sample:
        """Return the sample with other sizes: rows and positions are left out or repeated."""

        def resize(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            if value.dim() and value.shape[0] == self.batch:
                value = _with_size(value, 0, batch)
            elif value.dim() and value.shape[0] in lengths:  # positions that all rows share
                value = _with_size(value, 0, lengths[value.shape[0]])
            if value.dim() in (2, 3) and value.shape[1] in lengths:
                value = _with_size(value, 1, lengths[value.shape[1]])
            return value

        return Sample(*rebuild(sample.args, sample.kwargs, resize))


def _with_size(tensor: Tensor, dim: int, size: int) -> Tensor:
    own = tensor.shape[dim]
    if own == 0:  # nothing to repeat
        return tensor.clone()
    if size <= own:
        return tensor.narrow(dim, 0, size).clone()
    return tensor.repeat_interleave(size, dim).narrow(dim, 0, size).clone()


def _sizes_of(sample: Sample) -> _Sizes | None:
    tensors = [leaf.value for leaf in flatten(sample.args, sample.kwargs).tensors() if leaf.value.dim()]
    if not tensors:
        return None
    batch = Counter(tensor.shape[0] for tensor in tensors).most_common(1)[0][0]
    tokens = {t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()}
    sequences = {t.shape[1] for t in tensors if t.dim() == 3}
    return _Sizes(batch, frozenset(size for size in tokens or sequences if size > 1))


def _incomplete(model: nn.Module, sample: Sample) -> Iterator[Sample]:
    """Yield the sample without each of the tensors that the forward does not insist on."""
    parameters = signature(original_class(model).forward).parameters
    for name, value in sample.kwargs.items():
        optional = name not in parameters or parameters[name].default is None
        if isinstance(value, Tensor) and optional and len(sample.kwargs) + len(sample.args) > 1:
            yield Sample(sample.args, {key: value for key, value in sample.kwargs.items() if key != name})


def _masked(sample: Sample) -> Iterator[Sample]:
    """Yield the sample with masks that mask nothing, and with masks that mask the end of the last row."""
    masks = {name: value for name, value in sample.kwargs.items() if "mask" in name and _is_padding_mask(value)}
    yield Sample(sample.args, {**sample.kwargs, **{name: torch.ones_like(mask) for name, mask in masks.items()}})
    if masks:
        yield Sample(sample.args, {**sample.kwargs, **{name: _mask_end(mask) for name, mask in masks.items()}})


def _is_padding_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _mask_end(mask: Tensor) -> Tensor:
    padded = torch.ones_like(mask)
    padded[-1, -1] = 0
    return padded
