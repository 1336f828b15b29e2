"""PEFT itself, which is an extra."""

from typing import Any

import torch
from torch import Tensor


def peft_library(asked_by: str) -> Any:
    """Return the package `peft`.

    Raises:
        ImportError: it is not installed; says what needs it.
    """
    try:
        import peft
        import peft.tuners.tuners_utils
    except ImportError as error:
        raise ImportError(f"lora_fx.{asked_by} needs PEFT: pip install 'lora-fx[export]'") from error
    return peft


def rows_it_lacks(model: Any, adapter: str) -> list[str]:
    """Return the keys of the rows of embeddings that other adapters of a model have, and this one has not.

    PEFT (0.21) asks every adapter for them when it saves or loads one, and fails with a KeyError.
    """
    wrapper = peft_library("from_peft").utils.TrainableTokensWrapper
    wrapped = [(path, module.token_adapter) for path, module in model.named_modules() if isinstance(module, wrapper)]
    lacking = [path for path, layer in wrapped if not layer.tied_adapter and adapter not in layer.token_indices]
    return [f"{path}.token_adapter.trainable_tokens_delta" for path in lacking]


def state_of(model: Any, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter of PEFT's, by the keys of its files."""
    lacking = rows_it_lacks(model, adapter)
    state = model.state_dict() | {f"{key}.{adapter}": torch.zeros(0) for key in lacking}
    library = peft_library("from_peft")
    tensors: dict[str, Tensor] = library.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    return {key: tensor for key, tensor in tensors.items() if key not in lacking}
