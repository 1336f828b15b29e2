"""A file of PEFT's and a model: what PEFT would make of the two, where that is not what the tensors alone say."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_fx.errors import AdapterMismatchError, LoraFxWarning, RefusedError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.describe import ZERO_ROW, beyond_peft
from lora_fx.files.adapter.names import begins_in, ends_of, is_of_attention, owner_of, pattern_name
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.files.adapter.site import SavedSite
from lora_fx.files.adapter.tokens import with_ties
from lora_fx.models.layers import is_layer
from lora_fx.models.overrides import accelerate_hooks
from lora_fx.models.shards import whole
from lora_fx.models.wrappers import without_wrappers
from lora_fx.text import listing

_OTHER_BANKS = (0, 19)
"""The first PEFT whose factors of 3-D parameters lie as they do now (peft#3165)."""


def as_peft_reads(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """Return a file with what counts of it in the model: base weights that differ, one stem for each site.

    Raises:
        AdapterMismatchError: tensors that belong to nothing in the model, factors of experts from before PEFT 0.19.
        RefusedError: rows of an embedding with which PEFT computes something else than its weight shows.
    """
    if not file.is_foreign:
        return file
    _refuse_old_banks(file, model)
    return with_ties(_with_loose(replace(file, sites=_acting(file.sites)), model), model)


def _acting(sites: Sequence[SavedSite]) -> tuple[SavedSite, ...]:
    """Return the sites without stems that have no effect: an attention's out_proj is adapted with the attention."""
    acting = {pattern_name(site.stem) for site in sites if is_of_attention(site.stem)}
    under = {site.stem: site.stem.removesuffix(".out_proj") for site in sites}
    without = {stem: None for stem, attention in under.items() if attention in acting and attention != stem}
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
    loose = file.loose
    there = {name: str(list(own[name].shape)) if name in own else "has no such tensor" for name in loose}
    given = {name: str(list(value.shape)) for name, value in loose.items()}
    unknown = [(name, given[name], there[name]) for name in loose if there[name] != given[name]]
    if unknown:
        raise AdapterMismatchError(
            "the file holds tensors of another base", unknown, "resize_token_embeddings makes room for added tokens"
        )
    other = {name: value for name, value in loose.items() if _differs(own[name], value)}
    owners = tuple(dict.fromkeys(name.rpartition(".")[0] for name in other))
    beside = {name: tensor for name, tensor in own.items() if name.rpartition(".")[0] in owners and name not in other}
    modules = {**{name: tensor.detach() for name, tensor in beside.items()}, **file.modules, **other}
    trained = tuple(dict.fromkeys((*file.header.trained, *owners)))
    return replace(file, modules=modules, header=replace(file.header, trained=trained))


def _differs(own: Tensor, value: Tensor) -> bool:
    return not own.is_meta and not torch.equal(whole(own).cpu(), value.to(own.dtype))


def _refuse_old_banks(file: AdapterFile, model: nn.Module) -> None:
    """Factors of experts from before PEFT 0.19 lie the other way round: square ones would load, and be wrong."""
    config = file.config
    if not config.target_parameters or _version(config) >= _OTHER_BANKS:
        return
    owners = {owner_of(site.stem) for site in file.sites}
    banks = [
        (name, str(list(parameter.shape)), f"factors of PEFT {config.peft_version or 'of a version that is not noted'}")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.dim() == 3 and name.endswith((*config.target_parameters,)) and name.rpartition(".")[0] in owners
    ]
    if banks:
        raise AdapterMismatchError(
            "PEFT has laid out the factors of 3-D parameters in another way since 0.19",
            banks,
            "merge it with the PEFT that wrote it; if that was 0.19 or later, note it as peft_version in its config",
        )


def _version(config: Configuration) -> tuple[int, ...]:
    numbers = config.peft_version.split(".")[:2]
    return tuple(map(int, numbers)) if all(re.fullmatch("[0-9]{1,9}", number) for number in numbers) else (0, 0)


def warn_of_missing(file: AdapterFile, model: nn.Module) -> None:
    """Name the modules that the configuration claims and the file has no factors for, as PEFT does: they stay as is."""
    config = file.config
    if not file.is_foreign:
        return
    there = {pattern_name(site.stem) for site in file.sites} | {site.path for site in file.sites}
    paths = [without_wrappers(path) for path, module in model.named_modules() if is_layer(module)]
    trained = frozenset(file.header.trained)
    whole = (path for path in paths if begins_in(f"{path}.", trained) or path.endswith(config.modules_to_save))
    there |= {*whole}
    missing = [path for path in paths if path not in there and config.claims(path)]
    names = () if isinstance(config.target_modules, str) else config.target_modules
    everything = {end for path, _ in model.named_modules() for end in ends_of(without_wrappers(path))}
    lacking = [name for name in names if name not in everything]
    if missing:
        warnings.warn(
            f"{file.folder}: the configuration claims {listing(missing)}, and the file has no factors for them: "
            "they stay as they are",
            LoraFxWarning,
            stacklevel=4,
        )
    if lacking and not config.target_parameters:
        warnings.warn(f"target_modules names {listing(lacking)}, which the model lacks", LoraFxWarning, stacklevel=4)
    known = there | {site.parameter for site in file.sites}
    idle = [*dict.fromkeys((*config.rank_pattern.idle(known), *config.alpha_pattern.idle(known)))]
    if idle:
        text = f"rank_pattern and alpha_pattern name {listing(idle)}, which fits no layer of the file"
        warnings.warn(text, LoraFxWarning, stacklevel=4)


def refuse_beyond_peft(twin: nn.Module, files: Sequence[AdapterFile]) -> None:
    """Refuse sites of PEFT's files with which it computes something else, as `save` does for it.

    Raises:
        RefusedError: naming every site, and why.
    """
    foreign = {site.path: site for file in files for site in file.sites if not site.noted and _is_plain(site)}
    reasons = (*beyond_peft(twin), *_hooked(twin))
    beyond = [(path, reason) for path, reason in reasons if path in foreign and reason != ZERO_ROW]
    if beyond:
        raise RefusedError("PEFT adapts these in another way than their weight shows", list(dict.fromkeys(beyond)))


def _is_plain(site: SavedSite) -> bool:
    return not is_of_attention(site.stem) and site.stem == site.path


def _hooked(twin: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in twin.named_modules():
        if (module._forward_hooks or module._forward_pre_hooks) and not accelerate_hooks(module):
            yield without_wrappers(path), "a hook runs around the layer, and PEFT adds its product outside of that"
