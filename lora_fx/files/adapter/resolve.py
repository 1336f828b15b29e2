"""What the names in an adapter's files mean in a model: raw parameters, and attention as PEFT writes it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lora_fx.adapters.factors.kinds import Convolution
from lora_fx.discovery.weight_uses import WeightUse
from lora_fx.errors import AdapterMismatchError
from lora_fx.files.adapter.codec import banked_layout
from lora_fx.files.adapter.names import has_end, is_of_attention, owner_of, parameter_stem, pattern_name
from lora_fx.files.adapter.peftfiles import as_peft_reads
from lora_fx.files.adapter.read import AdapterFile
from lora_fx.files.adapter.site import SavedSite
from lora_fx.models.layers import kind_of
from lora_fx.models.tensors import dotted
from lora_fx.rules.ruleset import LoRAConfig


def resolved(files: Sequence[AdapterFile], model: nn.Module) -> list[AdapterFile]:
    """Return the files with PEFT's names for raw parameters and attention replaced by those of the model's sites.

    Raises:
        AdapterMismatchError: raw parameters of which a file holds some, but not all, or with other ranks.
    """
    files = [as_peft_reads(_outside_of_ddp(file, model), model) for file in files]
    problems = [problem for file in files for problem in _parameter_problems(file, model)]
    if problems:
        raise AdapterMismatchError("the adapter does not fit this model", problems)
    return [replace(file, sites=tuple(_site(site, file, model) for site in file.sites)) for file in files]


def _outside_of_ddp(file: AdapterFile, model: nn.Module) -> AdapterFile:
    """Return a file of a model inside of DataParallel or DDP, which call it `module`, with the model's own names."""
    names = [*(site.path for site in file.sites), *file.modules, *file.loose, *file.rows, *file.biases]
    if "module" in model._modules or not all(name.startswith("module.") for name in names):
        return file

    def own(name: str) -> str:
        return name.removeprefix("module.")

    return replace(
        file,
        sites=tuple(replace(site, path=own(site.path), stem=own(site.stem)) for site in file.sites),
        modules={own(name): tensor for name, tensor in file.modules.items()},
        loose={own(name): tensor for name, tensor in file.loose.items()},
        rows={own(path): rows for path, rows in file.rows.items()},
        biases={own(name): tensor for name, tensor in file.biases.items()},
        header=replace(
            file.header,
            trained=tuple(map(own, file.header.trained)),
            base={own(path): values for path, values in file.header.base.items()},
        ),
    )


def _site(site: SavedSite, file: AdapterFile, model: nn.Module) -> SavedSite:
    if site.noted:
        return site
    if isinstance(_module(pattern_name(site.path), model), nn.MultiheadAttention) and is_of_attention(site.path):
        # PEFT 0.21 adds the delta of an attention's out_proj twice; what was trained so is read so
        return replace(site, path=f"{pattern_name(site.path)}.out_proj", lora_B=site.lora_B * 2)
    name = _wanted(owner_of(site.stem), file, model).get(site.stem)
    if name is not None:
        return _of_parameter(replace(site, lora=_lora(site, name, file, model)), name, model)
    return replace(site, lora=_lora_of_groups(site, model))


def _module(path: str, model: nn.Module) -> nn.Module | None:
    """Return the module at a path that a file names, or None."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _of_parameter(site: SavedSite, name: str, model: nn.Module) -> SavedSite:
    """Return a site whose weight PEFT took for a raw parameter, under the name that it has here: a layer's own path."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    kind = kind_of(owner) if last == "weight" else None
    if kind is None:
        return replace(site, path=name)
    if kind.layout == "in_out":  # its factors are those of what is stored
        site = replace(site, lora_A=site.lora_B.t(), lora_B=site.lora_A.t())
    return replace(site, path=path, embedding=isinstance(owner, nn.Embedding))


def _lora_of_groups(site: SavedSite, model: nn.Module) -> LoRAConfig:
    """Return the settings of a site; where it is a grouped convolution, its r is that of each group."""
    owner = _module(site.path, model)
    groups = owner.groups if isinstance(owner, Convolution) else 1
    if groups == 1 or site.lora.r % groups:
        return site.lora
    alpha = site.lora.scaling * site.lora.r / groups
    return replace(site.lora, r=site.lora.r // groups, alpha=alpha, rslora=False)


def _wanted(owner: str, file: AdapterFile, model: nn.Module) -> dict[str, str]:
    """Return the raw parameters of a module that PEFT adapted, by the stems of their keys."""
    module = _module(owner, model)
    parameters = {} if module is None else module._parameters
    names = [dotted(owner, name) for name, parameter in parameters.items() if parameter is not None]
    wanted = [name for name in names if has_end(name, file.config.target_parameters)]
    return {parameter_stem(owner, position, len(wanted)): name for position, name in enumerate(wanted)}


def _parameter_problems(file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Yield what would let one parameter's factors pass for another's, or for those of another rank."""
    given = {site.stem: site for site in file.sites if not site.noted}
    for owner in dict.fromkeys(map(owner_of, given)):
        for stem, name in _wanted(owner, file, model).items():
            if stem not in given:
                yield name, "has no factors in the file", "is one of target_parameters"
            else:
                yield from _rank_problem(given[stem], name, file, model)


def _rank_problem(site: SavedSite, name: str, file: AdapterFile, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    rank = file.config.rank_at(name)
    rows = rank * _bank(model.get_parameter(name))
    if site.lora_A.shape[0] != rows:
        yield name, f"lora_A has {site.lora_A.shape[0]} rows", f"{rows} by adapter_config.json, r {rank}"


def _bank(parameter: Tensor) -> int:
    return parameter.shape[0] if parameter.dim() == 3 else 1


def _lora(site: SavedSite, name: str, file: AdapterFile, model: nn.Module) -> LoRAConfig:
    rank = site.lora_A.shape[0] // _bank(model.get_parameter(name))
    return replace(site.lora, r=rank, alpha=file.config.alpha_at(name), bias=False)


def uses_in_files(files: Sequence[AdapterFile], model: nn.Module) -> dict[str, WeightUse]:
    """Return how the model uses raw parameters, as far as the files of an adapter say so, by their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return dict(use for file in files for site in file.sites for use in _uses(site, model, parameters))


def _uses(site: SavedSite, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, WeightUse]]:
    if site.parameter or site.read:
        yield (site.parameter or dotted(site.path, "weight")), WeightUse(site.op, site.layout, 1, site.read)
    elif not site.noted and site.path in parameters:
        is_bank = parameters[site.path].dim() == 3
        layout = banked_layout(model.get_submodule(site.path.rpartition(".")[0]))
        yield site.path, WeightUse("experts" if is_bank else "matmul", layout, 1, False)
