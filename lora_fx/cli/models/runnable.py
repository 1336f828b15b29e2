"""MODEL on the command line as something that can run a step."""

from inspect import signature
from typing import Any

import torch
from torch import nn

from lora_fx.cli.models.spec import load_model
from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample

SEED = 0


def runnable(spec: str, tokens: tuple[int, int] | None = None, trust: bool = False) -> tuple[nn.Module, object]:
    """Return (model, example inputs or None) for what the user wrote as MODEL, with values.

    A directory of transformers needs its configuration only: the values of weights do not change what a step costs.

    Args:
        spec: as for `load_model`.
        tokens: (batch, length) of random token ids to call the model with, in place of its own inputs.

    Raises:
        ModelSpecError: says what is wrong with the text, the file, or what the factory returned.
        RefusedError: token ids are given to a model that takes none.
    """
    model, inputs = _loaded(spec, trust)
    return model, inputs if tokens is None else token_sample(model, *tokens)


def _loaded(spec: str, trust: bool) -> tuple[nn.Module, object]:
    if not spec.startswith("hf:"):
        return load_model(spec, weights=True, trust=trust)
    blank, inputs = load_model(spec)
    kind: Any = type(blank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        made: nn.Module = kind(blank.config)
    return made, inputs


def token_sample(model: nn.Module, batch: int, length: int) -> Sample:
    """Return random token ids, the same for the same sizes, as a model of transformers takes them.

    Raises:
        RefusedError: the model has no `input_ids`, or does not say how many tokens it knows.
    """
    parameters = signature(model.forward).parameters
    known = _embeddings(model)
    if "input_ids" not in parameters or not isinstance(known, nn.Embedding):
        raise RefusedError("--tokens is for models of transformers that take input_ids; let the factory return inputs")
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, known.num_embeddings, (batch, length), generator=generator)
    return Sample((), {"input_ids": ids} | ({"use_cache": False} if "use_cache" in parameters else {}))


def _embeddings(model: Any) -> object:
    """Return the embedding of tokens of a model of transformers; None of any other."""
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return None
    return model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
