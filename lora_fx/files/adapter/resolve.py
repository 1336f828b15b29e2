"""What the names in an adapter's files mean in a model: raw parameters, and attention as PEFT writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lora_fx.adapters.factors.kinds import Convolution
from lora_fx.discovery.weight_uses import WeightUse
from lora_fx.errors import AdapterMismatchError
from lora_fx.files.adapter.codec import banked_layout
from lora_fx.files.adapter.names import is_of_attention, pattern_name, pattern_value, split_stem
from lora_fx.files.adapter.read import AdapterFile, SavedSite
from lora_fx.models.layers import kind_of
from lora_fx.models.tensors import dotted
from lora_fx.rules.ruleset import LoRAConfig


def resolved(files: Sequence[AdapterFile], model: nn.Module) -> list[AdapterFile]:
    """Return the files with PEFT's names for raw parameters and attention replaced by those of the model's sites.

    Raises:
        AdapterMismatchError: raw parameters of which a file holds some, but not all, or with other ranks.
    """
    problems = [problem for file in files for problem in _parameter_problems(file, model)]
    if problems:
        raise AdapterMismatchError("the adapter does not fit this model", problems)
    return [replace(file, sites=tuple(_site(each, file, model) for each in file.sites)) for file in files]


def _site(each: SavedSite, file: AdapterFile, model: nn.Module) -> SavedSite:
    if each.note is not None:
        return each
    if isinstance(_module(pattern_name(each.path), model), nn.MultiheadAttention) and is_of_attention(each.path):
        # PEFT 0.21 adds the delta of an attention's out_proj twice; what was trained so is read so
        return replace(each, path=f"{pattern_name(each.path)}.out_proj", lora_B=each.lora_B * 2)
    name = _parameter(each.stem, file, model)
    if name is not None:
        return _of_parameter(replace(each, lora=_lora(each, name, file, model)), name, model)
    return replace(each, lora=_lora_of_groups(each, model))


def _module(path: str, model: nn.Module) -> nn.Module | None:
    """Return the module at a path that a file names, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _of_parameter(each: SavedSite, name: str, model: nn.Module) -> SavedSite:
    """Return a site whose weight PEFT took for a raw parameter, under the name that it has here: a layer's own path."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = kind_of(owner) if last == "weight" else None
    if kind is None:
        return replace(each, path=name)
    if kind.layout == "in_out":  # its factors are those of what is stored
        each = replace(each, lora_A=each.lora_B.t(), lora_B=each.lora_A.t())
    return replace(each, path=path, embedding=isinstance(owner, nn.Embedding))


def _lora_of_groups(each: SavedSite, model: nn.Module) -> LoRAConfig:
    """Return the settings of a site; where it is a grouped convolution, its r is that of each group."""
    owner = _module(each.path, model)
    groups = owner.groups if isinstance(owner, Convolution) else 1
    if groups == 1 or each.lora.r % groups:
        return each.lora
    alpha = each.lora.scaling * each.lora.r / groups
    return replace(each.lora, r=each.lora.r // groups, alpha=alpha, rslora=False)


def _wanted(owner: str, file: AdapterFile, model: nn.Module) -> list[str]:
    """Return the raw parameters of a module that PEFT adapted, in the order of registration."""
    module = _module(owner, model)
    parameters = {} if module is None else module._parameters
    names = [dotted(owner, name) for name, parameter in parameters.items() if parameter is not None]
    return [name for name in names if any(name == each or name.endswith(f".{each}") for each in file.parameters)]


def _parameter(stem: str, file: AdapterFile, model: nn.Module) -> str | None:
    """Return the raw parameter that a stem stands for: they are nested in the order of registration."""
    owner, depth = split_stem(stem)
    wanted = _wanted(owner, file, model)
    position = len(wanted) - 1 - depth
    return wanted[position] if 0 <= position < len(wanted) else None


def _parameter_problems(file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield what would let one parameter's factors pass for another's, or for those of another rank."""
    given = {each.stem: each for each in file.sites if each.note is None}
    for owner in dict.fromkeys(split_stem(stem)[0] for stem in given):
        wanted = _wanted(owner, file, model)
        for position, name in enumerate(wanted):
            each = given.get(owner + ".base_layer" * (len(wanted) - 1 - position))
            if each is None:
                yield name, "has no factors in the file", "is one of target_parameters"
            else:
                yield from _rank_problem(each, name, file, model)


def _rank_problem(each: SavedSite, name: str, file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    assert file.patterns is not None
    rank = pattern_value(file.patterns.rank_pattern, name, file.patterns.r)
    rows = rank * _bank(model.get_parameter(name))
    if each.lora_A.shape[0] != rows:
        yield name, f"lora_A has {each.lora_A.shape[0]} rows", f"{rows} by adapter_config.json, r {rank}"


def _bank(parameter: Tensor) -> int:
    return parameter.shape[0] if parameter.dim() == 3 else 1


def _lora(each: SavedSite, name: str, file: AdapterFile, model: nn.Module) -> LoRAConfig:
    assert file.patterns is not None
    alpha = pattern_value(file.patterns.alpha_pattern, name, file.patterns.lora_alpha)
    return replace(each.lora, r=each.lora_A.shape[0] // _bank(model.get_parameter(name)), alpha=alpha, bias=False)


def uses_in_files(files: Sequence[AdapterFile], model: nn.Module) -> dict[str, WeightUse]:
    """Return how the model uses raw parameters, as far as the files of an adapter say so, by their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return dict(use for file in files for site in file.sites for use in _uses(site, model, parameters))


def _uses(each: SavedSite, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, WeightUse]]:
    note = each.note
    if note is not None and (note.parameter or note.read):
        yield (note.parameter or dotted(note.path, "weight")), WeightUse(note.op, note.layout, 1, note.read)
    elif note is None and each.path in parameters:
        is_bank = parameters[each.path].dim() == 3
        layout = banked_layout(model.get_submodule(each.path.rpartition(".")[0]))
        yield each.path, WeightUse("experts" if is_bank else "matmul", layout, 1, False)
