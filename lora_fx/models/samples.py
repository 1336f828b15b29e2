"""One sample of a model's inputs, and the ways in which users give several."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.errors import CaptureError
from lora_fx.models.modes import normal
from lora_fx.models.torch_internals import pytree
from lora_fx.models.twin import is_meta
from lora_fx.models.wrappers import check_module


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
    check_module(model)
    samples = next(_made_up(model), ()) if example_inputs is None else samples_of(example_inputs)
    tried = Samples(tuple(map(_normal, samples)), example_inputs is not None, False)
    return without_values(tried) if is_meta(model) else tried


def without_values(tried: Samples) -> Samples:
    """Return the samples on the meta device; the given ones stay as they are."""
    return replace(tried, items=tuple(map(_on_meta, tried.items)), on_meta=True)


def candidates(model: nn.Module, tried: Samples) -> Iterator[tuple[Sample, ...]]:
    """Yield the samples, and, where they were made up, what else may suit the model, made when it is asked for."""
    yield tried.items
    if not tried.given:
        for samples in itertools.islice(_made_up(model), 1, None):
            yield tuple(map(_on_meta, samples)) if tried.on_meta else samples


def _normal(sample: Sample) -> Sample:
    """Return the sample with what was made in inference mode as autograd takes it."""
    held = (sample.args, sample.kwargs)
    sealed = any(isinstance(one, Tensor) and one.is_inference() for one in pytree.tree_leaves(held))
    return Sample(*pytree.tree_map_only(Tensor, normal, held)) if sealed else sample


def _on_meta(sample: Sample) -> Sample:
    """Return the sample with its tensors on the meta device; the sample itself stays as it is."""
    return Sample(*pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (sample.args, sample.kwargs)))


def call(*args: Any, **kwargs: Any) -> Sample:
    """Return one sample of inputs: `call(ids, attention_mask=mask)` stands for `model(ids, attention_mask=mask)`."""
    return Sample(args, kwargs)


def samples_of(example_inputs: object, called: str = "example_inputs") -> tuple[Sample, ...]:
    """Return the samples that a user gave: a tuple (positional), a dict (keyword), a `call(...)`, or a list of these.

    Args:
        example_inputs: what was given.
        called: what errors call it.

    Raises:
        CaptureError: for anything else; says what was found.
    """
    items = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not items:
        raise CaptureError(f"{called} is an empty list", advice="leave it out, or give a tuple, a dict or a call")
    return tuple(_sample(item, called) for item in items)


def batches_of(data: object) -> list[Sample]:
    """Return the samples in batches that a user gave.

    Raises:
        CaptureError: it is one batch, whose parts would be taken for batches, or none at all; or as `samples_of`.
    """
    is_one = isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data)
    if is_one or isinstance(data, (Mapping, Tensor, str, bytes, Sample)) or not _can_be_iterated(data):
        found = f"Tensor {list(data.shape)}" if isinstance(data, Tensor) else type(data).__name__
        raise CaptureError("`data` is no iterable of batches", [("found", found)], "put one batch into a list: [batch]")
    batches: Any = data
    return [sample for batch in batches for sample in samples_of(batch, "a batch of `data`")]


def _can_be_iterated(data: object) -> bool:
    """Whether a `for` loop takes it: a torch Dataset is no Iterable, and only has `__getitem__`."""
    try:
        iter(data)  # type: ignore[call-overload]
    except TypeError:
        return False
    return True


def _sample(item: object, called: str) -> Sample:
    if isinstance(item, Sample):
        return item
    if isinstance(item, tuple):
        return Sample(item)
    if isinstance(item, Mapping):  # a tokenizer's BatchEncoding is one
        return Sample((), {str(key): value for key, value in item.items()})
    if isinstance(item, Tensor):
        raise CaptureError(
            f"{called} is a bare tensor",
            [("found", f"Tensor {list(item.shape)}")],
            "put it into a tuple: example_inputs=(x,)" if called == "example_inputs" else "put it into a tuple: (x,)",
        )
    raise CaptureError(
        f"{called} is of type {type(item).__name__}",
        advice="give a tuple (positional), a dict (keyword), a lora_fx.call(...), or a list of these",
    )


def _made_up(model: nn.Module) -> Iterator[tuple[Sample, ...]]:
    """Yield inputs that may suit the model, the likeliest first: of its class, of Lightning, of its config.

    transformers' `dummy_inputs` are token ids, whatever a model takes.
    """
    return filter(None, (make(model) for make in (dummy_samples, _of_lightning, _of_texts, _of_config)))


def _of_lightning(model: nn.Module) -> tuple[Sample, ...]:
    """Return a LightningModule's own example."""
    example = getattr(model, "example_input_array", None)
    if isinstance(example, Tensor):
        return (Sample((example,)),)
    return samples_of(example) if isinstance(example, (tuple, Mapping)) else ()


def _of_texts(model: nn.Module) -> tuple[Sample, ...]:
    """Return what a model that tokenises by itself makes of two sentences (sentence-transformers)."""
    tokenize = getattr(model, "tokenize", None)
    if not callable(tokenize):
        return ()
    try:
        features = tokenize(["a first sentence", "and a second, longer one"])
    except Exception:  # its tokenizer is not there
        return ()
    return (Sample((dict(features),)),) if isinstance(features, Mapping) else ()


def _of_config(model: nn.Module) -> tuple[Sample, ...]:
    """Return inputs of the sizes that a transformers config tells, for the input that the model's class names."""
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(name, str):
        return ()
    shapes = {
        "pixel_values": (2, _size(config, "num_channels", 3), *_image(config)),
        "input_features": (2, _size(config, "num_mel_bins", 80), 2 * _size(config, "max_source_positions", 1500)),
        "input_values": (2, 16_000),
    }
    if name not in shapes:
        return ()
    device = next((p.device for p in model.parameters()), None)
    inputs = {name: torch.rand(shapes[name], generator=torch.Generator().manual_seed(0)).to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.ones(2, 3, dtype=torch.long, device=device)
    return (Sample((), inputs),)


def _size(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, getattr(getattr(config, "vision_config", None), name, default))
    return value if isinstance(value, int) else default


def _image(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", getattr(getattr(config, "vision_config", None), "image_size", 224))
    return (size, size) if isinstance(size, int) else tuple(size)


def dummy_samples(model: nn.Module) -> tuple[Sample, ...] | None:
    """Return the samples that the model's own class offers (transformers' `dummy_inputs`), or None."""
    if not isinstance(getattr(type(model), "dummy_inputs", None), property):
        return None
    try:
        inputs = model.dummy_inputs
    except Exception:  # some classes inherit the property without what it needs
        return None
    return (Sample((), dict(inputs)),) if isinstance(inputs, Mapping) else None
