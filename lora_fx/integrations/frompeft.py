"""from_peft: a model that PEFT has adapted → a twin of its base with the same adapters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lora_fx.discovery.study import CAPTURING
from lora_fx.errors import RefusedError
from lora_fx.files.adapter import restore
from lora_fx.files.adapter.adding import add_adapter
from lora_fx.files.adapter.configuration import configuration_of
from lora_fx.files.adapter.names import PREFIX
from lora_fx.files.adapter.read import AdapterFile, adapter_in_memory
from lora_fx.integrations.loaded import twin_of
from lora_fx.integrations.peftlibrary import peft_library, state_of
from lora_fx.integrations.peftsettings import settings_of
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.modes import making
from lora_fx.models.overrides import accelerate_hooks
from lora_fx.models.samples import samples_for
from lora_fx.models.twin import twin_without
from lora_fx.models.wrappers import holds_peft, without_wrappers
from lora_fx.progress.steps import ShowProgress
from lora_fx.rules.keys import is_adapter_name
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.text import listing
from lora_fx.tuned import build
from lora_fx.tuned.switching import use


def from_peft(
    peft_model: nn.Module,
    example_inputs: object = None,
    optimise: bool | Sequence[str] = True,
    *,
    adapter: str | None = None,
    progress: ShowProgress = None,
) -> nn.Module:
    """Return an adapted twin of the base that PEFT holds, with the values of PEFT's adapters; the model given stays.

    The twin computes what the given model computes.  Its base shares the memory of PEFT's; its adapters have memory
    of their own, and PEFT's names.  What PEFT trains whole is trained whole here; where A alone of A and B is frozen,
    as by PEFT's optimizer for LoRA-FA, it is so here (`lora_fa`).

    Args:
        peft_model: a `peft.PeftModel` with LoRA, or a model with LoRA layers of PEFT's, as `add_adapter` of
            transformers and diffusers makes it.
        example_inputs: as for `plan`, of the base; as are `optimise` for `apply` and `progress`.
        adapter: which adapter alone; by default all that there are, of which those are in use that PEFT has active.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: PEFT has no layer in it.
        RefusedError: what has no counterpart here, by its name: merged, switched off or rescaled adapters,
            hooks on PEFT's layers, several adapters that train parts of the model itself.
        AdapterFileError, AdapterMismatchError: as `load`; another method than LoRA.
    """
    passes = build.optimisations(optimise)
    _check_model(peft_model)
    refuse_sharded(peft_model, "PEFT's adapters in a sharded model are not taken over", "from_peft before fully_shard")
    names = _adapters_in(peft_model, adapter)
    active = {adapter} if adapter is not None else _active(peft_model)
    with making("from_peft", progress, 9 + CAPTURING):
        files = sorted((_file_of(peft_model, name) for name in names), key=_is_adapter_alone)
        base = _base_of(peft_model)
        twin = twin_of(base, *restore.fitted_files(files[:1], base, samples_for(base, example_inputs)), passes)
        for file in files[1:]:
            add_adapter(twin, file)
    if active != {*names} or len(files) > 1:
        use(twin, [file.header.adapter for file in files if file.header.adapter in active])
    return twin


def _is_adapter_alone(file: AdapterFile) -> bool:
    """Whether nothing of the model itself is trained with it; what is not can only be the first of several."""
    return not (file.header.trained or file.biases or any(site.lora.bias for site in file.sites))


def _check_model(model: object) -> None:
    """Do nothing for a model that holds adapters of PEFT.

    Raises:
        ImportError: PEFT is not installed.
        TypeError: it is something else.
    """
    peft_library("from_peft")
    if not isinstance(model, nn.Module) or not holds_peft(model):
        raise TypeError(f"the model must be a peft.PeftModel or hold PEFT's layers, found {type(model).__name__}")


def _inner(model: Any) -> Any:
    """Return the model that PEFT has put its layers into: it may be inside of a PeftModel, or bear them by itself."""
    peft = peft_library("from_peft")
    return model.base_model.model if isinstance(model, (peft.PeftModel, peft.PeftMixedModel)) else model


def _layers(model: Any) -> list[tuple[str, Any]]:
    kind = peft_library("from_peft").tuners.tuners_utils.BaseTunerLayer
    return [(path, layer) for path, layer in _inner(model).named_modules() if isinstance(layer, kind)]


def _active(model: Any) -> set[str]:
    return {name for _, layer in _layers(model) for name in layer.active_adapters}


def _adapters_in(model: Any, wanted: str | None) -> list[str]:
    """Return the names of the adapters that are asked for.

    Raises:
        RefusedError: there is none of that name, or the model does not compute with them alone.
    """
    names = [*_inner(model).peft_config]
    if wanted is not None and wanted not in names:
        raise RefusedError("the model has no such adapter", [("asked for", wanted), ("there are", listing(names))])
    names = names if wanted is None else [wanted]
    problems = [*dict.fromkeys(problem for name in names for problem in _problems(model, name))]
    if problems:
        raise RefusedError("the model does not stand as PEFT has adapted it", problems)
    return names


def _problems(model: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield what keeps a model of PEFT's from being its base with the adapter and nothing else."""
    if not is_adapter_name(name):
        yield name, "is no name here: letters, digits and _, a letter first; save it, and lora_fx.load its folder"
    scaled = peft_library("from_peft").tuners.lora.LoraLayer
    for path, layer in _layers(model):
        if layer.merged:
            yield path, "its adapter is merged into the base; unmerge_adapter() takes it out"
        if layer.disable_adapters:
            yield path, "its adapter is switched off; enable_adapter_layers() switches it on"
        if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
            yield path, "KaSA has yet to take parts of its weight away; call the model once"
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(hooks) and not accelerate_hooks(layer):
            yield path, "has a hook, which PEFT's layer takes with it; put it on the twin"
        if isinstance(layer, scaled) and name in layer.scaling:
            lora = LoRAConfig(layer.r[name], layer.lora_alpha[name], rslora=layer.use_rslora[name])
            if abs(layer.scaling[name] - lora.scaling) > 1e-6 * abs(lora.scaling):
                yield path, f"is scaled by {layer.scaling[name]:g}, and alpha says {lora.scaling:g}; set that back"


def _file_of(model: Any, name: str) -> AdapterFile:
    """Return the adapter of that name as its file would hold it.

    Raises:
        AdapterFileError: a method that is not plain LoRA.
    """
    settings, _ = settings_of(_inner(model).peft_config[name])
    # what a first value has changed in the base is in the base at hand
    config = configuration_of(settings | {"init_lora_weights": True}, f"adapter '{name}' of the model")
    config = replace(config, init="kaiming")
    keyed = {f"{PREFIX}{key.removeprefix(PREFIX)}": value.detach() for key, value in state_of(model, name).items()}
    file = adapter_in_memory(name, config, keyed)
    frozen = _with_frozen_a(model, name)
    loras = [replace(site.lora, adapter=name, lora_fa=site.stem in frozen) for site in file.sites]
    sites = tuple(replace(site, lora=lora) for site, lora in zip(file.sites, loras, strict=True))
    return replace(file, sites=sites, header=replace(file.header, adapter=name))


def _with_frozen_a(model: Any, name: str) -> set[str]:
    """Return the paths of the layers where an adapter of PEFT's trains B and not A."""
    factors = {
        path: (layer.lora_A[name].weight, layer.lora_B[name].weight)
        for path, layer in _layers(model)
        if name in getattr(layer, "lora_A", ()) and name in getattr(layer, "lora_B", ())
    }
    return {without_wrappers(path) for path, (A, B) in factors.items() if B.requires_grad and not A.requires_grad}


def _base_of(model: Any) -> nn.Module:
    """Return the base without anything of PEFT's, on shared memory; the PeftModel stays as it is.

    The model's own walk over its modules is of no use: PEFT's attention makes new parameters at every walk.

    Raises:
        RefusedError: the base cannot be copied, or refers to PEFT's layers otherwise than as its modules.
    """
    inner: nn.Module = _inner(model)
    base = twin_without(inner, list(_inside(inner)), _under, freeze=False)
    for name in ("peft_config", "_hf_peft_config_loaded"):  # of transformers: on the instance
        base.__dict__.pop(name, None)
    left = [(path, "is a layer of PEFT") for path in holds_peft(base)]
    if left:
        raise RefusedError("the base refers to its own layers in a way that PEFT's cannot be taken out of", left)
    return base


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _inside(child)


def _under(module: nn.Module) -> nn.Module | None:
    """Return what PEFT has put a layer around; None for a module that is not PEFT's."""
    peft = peft_library("from_peft")
    if isinstance(module, peft.utils.other.AuxiliaryTrainingWrapper):
        original: nn.Module = module.original_module
        return original
    return module._modules["base_layer"] if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) else None
