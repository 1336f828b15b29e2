"""What libraries put around a model: torch.compile, DataParallel, DDP, FSDP, activation checkpointing, PEFT."""

import re
import warnings

from torch import nn

from lora_fx.errors import LoraFxWarning, RefusedError
from lora_fx.models.walking import modules_of, named_modules_of

WRAPPING = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Names of children that wrappers inside of a model put into the names of what they hold."""
_NESTED = re.compile(rf"(^|\.)(?:{'|'.join(WRAPPING)})(?=\.|$)")
_CHECKPOINTING = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
_PARALLEL = {
    "torch.nn.parallel.data_parallel": "module",
    "torch.nn.parallel.distributed": "module",
    "torch._dynamo.eval_frame": "_orig_mod",
    _CHECKPOINTING: "_checkpoint_wrapped_module",
}
"""By the module that defines the class: the name of the child that is the model."""


def check_module(model: object) -> None:
    """Do nothing for a module.

    Raises:
        TypeError: it is something else, such as the path of an adapter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, found {type(model).__name__}")


def seen_through(model: nn.Module) -> nn.Module:
    """Return the model inside of torch.compile, DataParallel, DDP and checkpoint wrappers; any other as it is.

    Raises:
        RefusedError: it is inside of PEFT or of FSDP1, which hold its parameters in their own way.
        TypeError: it is no module.
    """
    check_module(model)
    home = type(model).__module__
    if home.startswith("peft."):
        raise RefusedError(
            "PEFT holds this model, and its own adapters with it",
            advice="give the model itself (peft_model.unload() returns it without PEFT's adapters), "
            "or lora_fx.from_peft(peft_model), a twin with them",
        )
    if home.startswith("torch.distributed.fsdp") and "_fsdp_wrapped_module" in model._modules:
        raise RefusedError(
            "FSDP1 holds the parameters of this model flattened and sharded",
            advice="give the model from before, or use fully_shard (FSDP2)",
        )
    inner = model._modules.get(_PARALLEL.get(home, ""))
    return model if inner is None else seen_through(inner)


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the submodule of that dotted path, which need not name the wrappers on its way.

    Raises:
        AttributeError: there is none.
    """
    module = model
    for name in filter(None, path.split(".")):
        child = module._modules.get(name)
        module = inside(module).get_submodule(name) if child is None else child
    return module


def inside(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers that stand within a model; any other as it is."""
    names = (*WRAPPING, _PARALLEL.get(type(module).__module__, ""))
    inner = next((child for name in names if (child := module._modules.get(name)) is not None), None)
    return module if inner is None else inside(inner)


def without_wrappers(name: str) -> str:
    """Return a dotted name without what wrappers inside of a model put into it; `layers.0._orig_mod.q` is `layers.0.q`.

    >>> without_wrappers("layers.0._checkpoint_wrapped_module.q_proj")
    'layers.0.q_proj'
    """
    if "_orig_mod" in name or "_wrapped_module" in name:  # most have none of it, and are asked for by the thousand
        name = _NESTED.sub("", name)
    return name.lstrip(".")


def warn_of_cache_made_again(model: nn.Module, level: int) -> None:
    """Warn where a layer that torch's reentrant checkpointing wraps would meet the KV cache that it has filled itself.

    What it computes again in the backward pass then has other gradients, with or without adapters
    (findings/transformers_cache_meets_reentrant_checkpoint.sh).

    Args:
        level: as `stacklevel` of `warnings.warn`, from here.
    """
    if getattr(getattr(model, "config", None), "use_cache", False) is not True:
        return
    wrappers = [module for module in modules_of(model) if type(module).__module__ == _CHECKPOINTING]
    if any(vars(wrapper)["checkpoint_impl"].name == "REENTRANT" for wrapper in wrappers):
        warnings.warn(
            "layers are checkpointed with CheckpointImpl.REENTRANT, and config.use_cache is on: in training they would "
            "meet the cache that they have filled, and get wrong gradients; set model.config.use_cache = False",
            LoraFxWarning,
            stacklevel=level,
        )


def holds_peft(model: nn.Module) -> list[str]:
    """Return the paths of the modules that hold adapters of PEFT."""
    named = named_modules_of(model)
    kinds = {kind for kind in {type(module) for _, module in named} if _is_of_peft(kind)}
    return [path for path, module in named if type(module) in kinds] if kinds else []


def _is_of_peft(kind: type) -> bool:
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return "peft.tuners.tuners_utils.BaseTunerLayer" in names
