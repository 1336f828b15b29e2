"""Tied weights: parameters that are one and the same, and what a transformers model says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def ties(model: nn.Module) -> Mapping[int, tuple[str, ...]]:
    """Return for each tied parameter, by identity, every name under which it or another view of its memory is found."""
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(_memory(parameter), []).append((name, parameter))
    return {
        id(parameter): tuple(name for name, _ in group)
        for group in groups.values()
        if len(group) > 1
        for _, parameter in group
    }


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the parameters that are one, for each such group."""
    return list(dict.fromkeys(ties(model).values()))


def _memory(tensor: Tensor) -> object:
    if tensor.is_meta:
        return id(tensor)
    try:
        return (tensor.device, tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else id(tensor)
    except RuntimeError:  # tensor subclasses without memory of their own
        return id(tensor)


def mark_untied(model: nn.Module) -> None:
    """Let a transformers model say that its weights are not tied, in place: in every config and on its classes."""
    for module in model.modules():
        for config in _configs(getattr(module, "config", None)):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            if getattr(module, name, None):
                module.__dict__[name] = {} if isinstance(getattr(module, name), dict) else []


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and those in it (`text_config`)."""
    if not callable(getattr(config, "to_dict", None)):
        return
    yield config
    for each in vars(config).values():
        yield from _configs(each)
