"""to_peft: an adapted model → a PeftModel on its base, with the same values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_fx.adapters.attach import all_attached, owner_path, with_values
from lora_fx.adapters.dicts import unspeakable
from lora_fx.errors import AdapterFileError, RefusedError
from lora_fx.files.adapter.describe import Described, beyond_peft, describe
from lora_fx.files.adapter.names import split_bias_key
from lora_fx.integrations.peftlibrary import peft_library, rows_it_lacks, state_of
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.modes import normal_tensors
from lora_fx.models.packed import is_packed
from lora_fx.models.tensors import own_parameters
from lora_fx.models.wrappers import seen_through
from lora_fx.tuned.listing import list_adapters
from lora_fx.tuned.undo import removed

_ADVICE = "lora_fx.save writes what PEFT reads"
_BIAS = ".base_layer.bias"
_TAKEN = "is an attribute of nn.ModuleDict, as which PEFT holds adapters by their names; lora_fx.rename gives another"


@normal_tensors()
def to_peft(tuned: nn.Module) -> nn.Module:
    """Return a `peft.PeftModel` on the base, with the values of the model's adapters; the adapted model itself stays.

    It computes what the model computes, in the same mode (train or eval), and its adapters can be trained.  Its base
    shares the memory of the model's, but for what PEFT trains there.  A of LoRA-FA requires no gradient, until PEFT's
    `set_adapter` lets all of an adapter require one.

    Args:
        tuned: an adapted model.

    Raises:
        ImportError: PEFT is not installed.
        RefusedError: what PEFT cannot have, or would compute otherwise, by the name of each site; nothing is made.
    """
    peft = peft_library("to_peft")
    refuse_sharded(seen_through(tuned), "PEFT's adapters would be in no shard group of this model", _ADVICE)
    tuned = with_values(seen_through(tuned))
    _refuse_without_weights(tuned)
    described = _described(tuned)
    used = _used(tuned)
    base = removed(tuned)
    own_parameters(base, _trained_biases(described), requires_grad=False)
    modes = [(module, module.training) for module in base.modules()]
    model: nn.Module = _adapted(peft, base, described, used)
    model.train(tuned.training)
    for module, mode in modes:
        module.training = mode
    return model


def _refuse_without_weights(tuned: nn.Module) -> None:
    """Raise RefusedError for layers that hold codes alone, as compressed-tensors packs them: PEFT asks for a weight."""
    sites = [(path, one) for path, one in all_attached(tuned) if one.spec.parameter == "weight"]
    linears = [(path, one.owner) for path, one in sites if isinstance(one.owner, nn.Linear)]  # PEFT knows hqq's
    packed = [(path, owner) for path, owner in linears if is_packed(owner)]
    facts = [(path, "holds codes and no weight") for path, owner in packed if "weight" not in owner._parameters]
    if facts:
        raise RefusedError("PEFT's layers read the weight of theirs", facts, "merge, or lora_fx.save for PEFT to load")


def _used(tuned: nn.Module) -> list[str]:
    """Return the names of the adapters that the model uses.

    Raises:
        RefusedError: none, or one with a weight.
    """
    adapters = [*list_adapters(tuned)]
    weighted = [(one.name, f"is used with the weight {one.weight:g}") for one in adapters if one.weight not in (0, 1)]
    if weighted or not any(one.active for one in adapters):
        facts = weighted or [(one.name, "is not in use") for one in adapters]
        raise RefusedError("PEFT has an adapter active as it is, or not", facts, "choose by lora_fx.use before")
    return [one.name for one in adapters if one.active]


def _described(tuned: nn.Module) -> list[Described]:
    """Return what files would hold of the model's adapters.

    Raises:
        RefusedError: naming every site that PEFT cannot have, or would compute otherwise.
    """
    problems = list(beyond_peft(tuned))
    problems += [(one.name, _TAKEN) for one in list_adapters(tuned) if unspeakable(one.name)]
    for path, adapter in all_attached(tuned):
        if not owner_path(path, adapter):
            problems.append((path, "PEFT cannot adapt what the model itself owns, only what a module in it does"))
        if adapter.lora_A.weight.is_meta:
            problems.append((path, "is on the meta device and has no values"))
    described: list[Described] = []
    try:
        described = describe(tuned)
    except AdapterFileError as error:  # DoRA and plain LoRA in one adapter
        problems += [
            (path, f"is {kind} beside others that are not, for which PEFT has one switch") for path, kind in error.facts
        ]
    if problems:
        raise RefusedError("PEFT cannot have these, or would compute something else with them", problems)
    return described


def _trained_biases(described: Sequence[Described]) -> list[str]:
    names = (split_bias_key(key) for adapter in described for key in adapter.tensors if key.endswith(_BIAS))
    others = (split_bias_key(key) for one in described if one.config["bias"] == "all" for key in one.tensors)
    return list(dict.fromkeys(name for name in (*names, *others) if name is not None))


def _adapted(peft: Any, base: nn.Module, described: Sequence[Described], used: Sequence[str]) -> Any:
    """Return the base in a PeftModel with all adapters, of which those are active that are in use."""
    model: Any = None
    for adapter in described:
        config = peft.LoraConfig(**{**adapter.config, "inference_mode": False})
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=adapter.name)
        else:
            _add(model, adapter.name, config)
        _fill(peft, model, adapter)
    model.base_model.set_adapter(used if len(used) > 1 else used[0])
    frozen = {f"{key.removesuffix('.weight')}.{one.name}.weight" for one in described for key in one.frozen}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return model


def _add(model: Any, name: str, config: Any) -> None:
    """Put one more adapter into a PeftModel.

    Raises:
        RefusedError: PEFT cannot have it beside those that are there.
    """
    try:
        model.add_adapter(name, config)
    except ValueError as error:
        raise RefusedError(f"PEFT cannot have '{name}' beside the other adapters", advice=str(error)) from error


def _fill(peft: Any, model: Any, adapter: Described) -> None:
    """Put the values of an adapter into PEFT's, which must be just those.

    Raises:
        RefusedError: PEFT has made other tensors of the configuration.
    """
    lacking = {key: torch.zeros(0) for key in rows_it_lacks(model, adapter.name)}
    with torch.no_grad():
        result = peft.set_peft_model_state_dict(model, {**adapter.tensors, **lacking}, adapter_name=adapter.name)
    own = [f"{key}.{adapter.name}" for key in lacking]
    unlike = [(key, "PEFT has no such tensor") for key in result.unexpected_keys if key not in own]
    more = state_of(model, adapter.name).keys() - adapter.tensors.keys()
    if adapter.config["bias"] == "all":  # PEFT counts buffers of that name, and what is trained whole once more
        more = {key for key in more if key.rpartition(".")[2] != "bias"}
    unlike += [(key, "PEFT has one more") for key in more]
    if unlike:
        raise RefusedError("PEFT makes something else of this adapter", unlike)
