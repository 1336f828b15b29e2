"""MODEL on the command line as something whose step of training is counted, without values."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from lora_fx.cli.models.runnable import token_sample
from lora_fx.cli.models.spec import load_model
from lora_fx.models.samples import Sample

_TOKENS = (1, 2048)
_DECODERS = ("ForCausalLM", "LMHeadModel")


def stepped(
    spec: str, tokens: tuple[int, int] | None, dtype: str | None, trust: bool
) -> tuple[nn.Module, object, torch.dtype | None]:
    """Return (model, example inputs or None, dtype of its weights or None for what they are).

    A directory of transformers has the dtype that its configuration tells, and a step of 1 × 2048 tokens where they are
    as many; of a decoder the tokens are its labels, so that the loss is its own.

    Raises:
        ModelSpecError: as `load_model`.
        RefusedError: token ids are given to a model that takes none.
    """
    model, inputs = load_model(spec, trust=trust)
    config: Any = getattr(model, "config", None)
    is_hf = spec.startswith("hf:")
    if tokens is not None or (is_hf and inputs is None and getattr(model, "main_input_name", "") == "input_ids"):
        inputs = _with_labels(model, token_sample(model, *(tokens or _shortened(config))))
    told = getattr(config, "dtype", None) if is_hf else None
    wanted = getattr(torch, dtype) if dtype else told if isinstance(told, torch.dtype) else None
    return model, inputs, wanted


def _shortened(config: Any) -> tuple[int, int]:
    """Return batch and length, of a length that the model has positions for."""
    most = getattr(config, "max_position_embeddings", None)
    return _TOKENS[0], min(_TOKENS[1], most if isinstance(most, int) and most > 0 else _TOKENS[1])


def _with_labels(model: nn.Module, sample: Sample) -> Sample:
    """Return the sample of a language model with the tokens as its labels."""
    is_decoder = type(model).__name__.endswith(_DECODERS) and "labels" in signature(model.forward).parameters
    return Sample((), sample.kwargs | ({"labels": sample.kwargs["input_ids"]} if is_decoder else {}))
