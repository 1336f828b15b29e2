"""A file of PEFT's and a model: what PEFT would make of the two, where that is not what the tensors alone say."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterMismatchError, LoraFxWarning, RefusedError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.describe import beyond_peft
from lora_fx.files.adapter.names import is_end, is_of_attention, owner_of, pattern_name
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.files.adapter.site import SavedSite
from lora_fx.models.layers import is_layer
from lora_fx.models.overrides import accelerate_hooks
from lora_fx.models.wrappers import without_wrappers
from lora_fx.text import listing

_OTHER_BANKS = (0, 19)
"""The first PEFT whose factors of 3-D parameters lie as they do now (peft#3165)."""


def as_peft_reads(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """Return a file with what counts of it in the model: base weights that differ, one stem for each site.

    Raises:
        AdapterMismatchError: tensors that belong to nothing in the model, factors of experts from before PEFT 0.19.
    """
    if not file.is_foreign:
        return file
    _refuse_old_banks(file, model)
    return _with_loose(replace(file, sites=_acting(file.sites)), model)


def _acting(sites: Sequence[SavedSite]) -> tuple[SavedSite, ...]:
    """Return the sites without stems that have no effect: an attention's out_proj is adapted with the attention."""
    acting = {pattern_name(site.stem) for site in sites if is_of_attention(site.stem)}
    without = [site.stem for site in sites if site.stem.removesuffix(".out_proj") in acting - {site.stem}]
    if without:
        warnings.warn(
            f"{listing(without)} beside the attention that owns it: PEFT runs the attention's alone, and so does this",
            LoraFxWarning,
            stacklevel=5,
        )
    return tuple(site for site in sites if site.stem not in without)


def _with_loose(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """Return the file with the base's tensors in it as modules that are trained whole, where they differ."""
    own = {without_wrappers(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    there = {name: str(list(own[name].shape)) if name in own else "has no such tensor" for name in file.loose}
    given = {name: str(list(value.shape)) for name, value in file.loose.items()}
    unknown = [(name, given[name], there[name]) for name in file.loose if there[name] != given[name]]
    if unknown:
        raise AdapterMismatchError(
            "the file holds tensors of another base", unknown, "resize_token_embeddings makes room for added tokens"
        )
    other = {name: value for name, value in file.loose.items() if _differs(own[name], value)}
    owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in other))
    beside = {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in owners and name not in other}
    modules = {**{name: tensor.detach() for name, tensor in beside.items()}, **file.modules, **other}
    trained = tuple(dict.fromkeys((*file.header.trained, *owners)))
    return replace(file, modules=modules, header=replace(file.header, trained=trained))


def _differs(own: Tensor, value: Tensor) -> bool:
    return not own.is_meta and not torch.equal(own.detach().cpu(), value.to(own.dtype))


def _refuse_old_banks(file: AdapterFile, model: nn.Module) -> None:
    """Factors of experts from before PEFT 0.19 lie the other way round: square ones would load, and be wrong."""
    config = file.config
    if not config.target_parameters or _version(config) >= _OTHER_BANKS:
        return
    owners = {owner_of(site.stem) for site in file.sites}
    banks = [
        (name, str(list(parameter.shape)), f"factors of PEFT {config.peft_version or 'of a version that is not noted'}")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() == 3 and name.endswith(config.target_parameters) and name.rpartition(".")[0] in owners
    ]
    if banks:
        raise AdapterMismatchError(
            "PEFT has laid out the factors of 3-D parameters in another way since 0.19",
            banks,
            "merge it with the PEFT that wrote it; if that was 0.19 or later, note it as peft_version in its config",
        )


def _version(config: Configuration) -> tuple[int, ...]:
    numbers = config.peft_version.split(".")[:2]
    return tuple(int(number) for number in numbers) if all(n.isdigit() for n in numbers) else (0, 0)


def warn_of_missing(file: AdapterFile, model: nn.Module) -> None:
    """Name the modules that the configuration claims and the file has no factors for, as PEFT does: they stay as is."""
    config = file.config
    if not file.is_foreign:
        return
    there = {pattern_name(site.stem) for site in file.sites} | {site.path for site in file.sites}
    paths = [without_wrappers(path) for path, module in model.named_modules() if is_layer(module)]
    claimed = [path for path in paths if _ends(path, config.target_modules) and not _is_left_out(path, config)]
    missing = [path for path in claimed if path not in there and not path.startswith(file.header.trained)]
    lacking = [name for name in config.target_modules if not any(is_end(name, path) for path in paths)]
    if missing:
        warnings.warn(
            f"{file.folder}: the configuration claims {listing(missing)}, and the file has no factors for them: "
            "they stay as they are",
            LoraFxWarning,
            stacklevel=4,
        )
    if lacking and not config.target_parameters:
        warnings.warn(f"target_modules names {listing(lacking)}, which the model lacks", LoraFxWarning, stacklevel=4)


def _ends(path: str, names: Sequence[str]) -> bool:
    return any(is_end(name, path) for name in names)


def _is_left_out(path: str, config: Configuration) -> bool:
    """Whether PEFT would not adapt a target: it is excluded, trained whole, or in a layer that is left out."""
    excluded = config.excluded
    if isinstance(excluded, str) or (
        config.layers and not any(str(layer) in path.split(".") for layer in config.layers)
    ):
        return True  # an expression of anybody's is not asked: what it leaves out is then not missed
    return _ends(path, excluded) or path.endswith(config.modules_to_save)


def refuse_beyond_peft(twin: nn.Module, files: Sequence[AdapterFile]) -> None:
    """Refuse sites of PEFT's files with which it computes something else, as `save` does for it.

    Raises:
        RefusedError: naming every site, and why.
    """
    foreign = {site.path: site for file in files for site in file.sites if not site.noted and _is_plain(site)}
    beyond = [(path, reason) for path, reason in (*beyond_peft(twin), *_hooked(twin)) if path in foreign]
    if beyond:
        raise RefusedError("PEFT adapts these in another way than their weight shows", list(dict.fromkeys(beyond)))


def _is_plain(site: SavedSite) -> bool:
    return not is_of_attention(site.stem) and site.stem == site.path


def _hooked(twin: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in twin.named_modules():
        if (module._forward_hooks or module._forward_pre_hooks) and not accelerate_hooks(module):
            yield without_wrappers(path), "a hook runs around the layer, and PEFT adds its product outside of that"
