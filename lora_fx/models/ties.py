"""Tied weights: parameters that are one and the same, and what a transformers model says of them."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lora_fx.models.shards import is_sharded
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import set_tensor
from lora_fx.models.walking import all_parameters_of, modules_of


def ties(model: nn.Module) -> Mapping[int, tuple[str, ...]]:
    """Return for each tied parameter, by identity, every name under which it or another view of its memory is found."""
    groups: dict[object, list[tuple[str, Tensor]]] = {}
    for name, parameter in all_parameters_of(model):
        groups.setdefault(memory_of(parameter), []).append((name, parameter))
    return {
        id(parameter): tuple(name for name, _ in group)
        for group in groups.values()
        if len(group) > 1
        for _, parameter in group
    }


def tied_names(model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the parameters that are one, for each such group."""
    return list(dict.fromkeys(ties(model).values()))


def memory_of(tensor: Tensor) -> object:
    """Return what is equal for tensors that are one weight: views of one memory in one shape."""
    if tensor.is_meta:
        return id(tensor)
    if type(tensor) is not nn.Parameter and is_sharded(tensor):  # an empty part stands in memory too
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return (
            part.device,
            part.untyped_storage().data_ptr() or id(tensor),
            part.storage_offset(),
            tuple(tensor.shape),
        )
    try:
        return (tensor.device, tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else id(tensor)
    except RuntimeError:  # tensor subclasses without memory of their own
        return id(tensor)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return what a transformers model calls its input embeddings; None if it has none, as a model of images."""
    asked = getattr(model, "get_input_embeddings", None)
    try:
        found = asked() if callable(asked) else None
    except NotImplementedError:  # which transformers raises where its class does not say
        return None
    return found if isinstance(found, nn.Module) else None


def says_tied(model: nn.Module) -> bool:
    """Whether a transformers model declares weights as tied that are not one: loading what it saves would tie them."""
    for module in modules_of(model):
        own = dict(module.named_parameters(remove_duplicate=False))
        if any(own[name] is not own[source] for name, source in _mapping(module).items()):
            return any(getattr(config, _FLAG, False) for config in _all_configs(model))
    return False


def mark_untied(model: nn.Module) -> None:
    """Let a transformers model say which of its weights are no longer tied, in place, so that it can be saved.

    What is said of ties is one flag of the config, for all of them: where it is cleared, whatever is still tied gets
    memory of its own, or `save_pretrained` would leave it out and loading would invent it.  Where the flag means more
    (T5 scales by it), it stays: loading ties no weights that differ.
    """
    mappings = [(module, mapping) for module in modules_of(model) if (mapping := _mapping(module))]
    clear = not _flag_means_more(model)
    for module, mapping in mappings:
        own = dict(module.named_parameters(remove_duplicate=False))
        kept = {} if clear else {name: source for name, source in mapping.items() if own[name] is own[source]}
        for name in mapping:
            if name not in kept and ties(module).get(id(own[name])):
                set_tensor(module, name, nn.Parameter(own[name].detach().clone(), own[name].requires_grad))
        _say(module, kept)
    if clear:
        for config in _all_configs(model):
            if getattr(config, _FLAG, False):
                setattr(config, _FLAG, False)


_FLAG = "tie_word_embeddings"


def _mapping(module: nn.Module) -> dict[str, str]:
    """Return which parameter of a transformers model is tied to which, by name; older releases name no source."""
    declared = getattr(module, "all_tied_weights_keys", None) or getattr(module, "_tied_weights_keys", None) or {}
    mapping = declared if isinstance(declared, dict) else dict.fromkeys(declared, "")
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: source if source in names else name for name, source in mapping.items() if name in names}


def _say(module: nn.Module, kept: dict[str, str]) -> None:
    for name in ("_tied_weights_keys", "all_tied_weights_keys"):
        declared = getattr(module, name, None)
        if declared:
            module.__dict__[name] = dict(kept) if isinstance(declared, dict) else list(kept)


def _flag_means_more(model: nn.Module) -> bool:
    """Whether clearing the flag would change more than ties: what a forward computes, or what the config reads back."""
    for kind in {original_class(module) for module in modules_of(model)}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is not None and _FLAG in code.co_names:
            return True
    return any(not _keeps_flag(config) for config in _all_configs(model) if getattr(config, _FLAG, False))


def _keeps_flag(config: Any) -> bool:
    """Whether a config that is written with a cleared flag is read as just that."""
    before = config.to_dict() | {_FLAG: False}
    after = type(config).from_dict(copy.deepcopy(before)).to_dict()
    return all(after.get(key, value) == value for key, value in before.items())


def _all_configs(model: nn.Module) -> Iterator[Any]:
    for module in modules_of(model):
        yield from _configs(getattr(module, "config", None))


def _configs(config: Any) -> Iterator[Any]:
    """Yield a config and those in it (`text_config`)."""
    if not callable(getattr(config, "to_dict", None)):
        return
    yield config
    for part in vars(config).values():
        yield from _configs(part)
