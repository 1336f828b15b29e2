"""One sample of a model's inputs, and the ways in which users give several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lora_fx.errors import CaptureError
from lora_fx.models.torch_internals import pytree
from lora_fx.models.twin import is_meta


@dataclass(frozen=True, slots=True)
class Sample:
    """Positional and keyword arguments of one forward call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Samples:
    """The inputs on which a model is tried."""

    items: tuple[Sample, ...]
    """Empty where there are none."""
    given: bool
    """Whether they are the user's own, which the model must not refuse."""
    on_meta: bool
    """Whether the model, and so they, have no values."""


def samples_for(model: nn.Module, example_inputs: object) -> Samples:
    """Return the samples that a user gave, or those that the model's own class offers; on the meta device if it is.

    Raises:
        CaptureError: as `samples_of`.
        TypeError: the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, found {type(model).__name__}")
    samples = dummy_samples(model) or () if example_inputs is None else samples_of(example_inputs)
    on_meta = is_meta(model)
    if on_meta:
        samples = tuple(map(_on_meta, samples))
    return Samples(samples, example_inputs is not None, on_meta)


def _on_meta(sample: Sample) -> Sample:
    """Return the sample with its tensors on the meta device; the sample itself stays as it is."""
    return Sample(*pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (sample.args, sample.kwargs)))


def call(*args: Any, **kwargs: Any) -> Sample:
    """Return one sample of inputs: `call(ids, attention_mask=mask)` stands for `model(ids, attention_mask=mask)`."""
    return Sample(args, kwargs)


def samples_of(example_inputs: object) -> tuple[Sample, ...]:
    """Return the samples that a user gave: a tuple (positional), a dict (keyword), a `call(...)`, or a list of these.

    Raises:
        CaptureError: for anything else; says what was found.
    """
    items = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not items:
        raise CaptureError("example_inputs is an empty list", advice="leave it out, or give a tuple, a dict or a call")
    return tuple(_sample(item) for item in items)


def _sample(item: object) -> Sample:
    if isinstance(item, Sample):
        return item
    if isinstance(item, tuple):
        return Sample(item)
    if isinstance(item, Mapping):  # a tokenizer's BatchEncoding is one
        return Sample((), {str(key): value for key, value in item.items()})
    if isinstance(item, Tensor):
        raise CaptureError(
            "example_inputs is a bare tensor",
            [("found", f"Tensor {list(item.shape)}")],
            "put it into a tuple: example_inputs=(x,)",
        )
    raise CaptureError(
        f"example_inputs is of type {type(item).__name__}",
        advice="give a tuple (positional), a dict (keyword), a lora_fx.call(...), or a list of these",
    )


def dummy_samples(model: nn.Module) -> tuple[Sample, ...] | None:
    """Return the samples that the model's own class offers (transformers' `dummy_inputs`), or None."""
    if not isinstance(getattr(type(model), "dummy_inputs", None), property):
        return None
    try:
        inputs = model.dummy_inputs
    except Exception:  # some classes inherit the property without what it needs
        return None
    return (Sample((), dict(inputs)),) if isinstance(inputs, Mapping) else None
