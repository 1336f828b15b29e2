"""What the names in an adapter's files mean in a model: raw parameters, and attention as PEFT writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from lora_fx.checkpoint.names import pattern_value, split_stem
from lora_fx.checkpoint.read import AdapterFile, SavedSite
from lora_fx.rules import LoRAConfig
from lora_fx.sites import Layout
from lora_fx.tensors import dotted
from lora_fx.weightuses import Uses, WeightUse

_INNER = ".base_layer."


def resolved(files: Sequence[AdapterFile], model: nn.Module) -> list[AdapterFile]:
    """Return the files with PEFT's names for raw parameters and attention replaced by those of the model's sites."""
    return [replace(file, sites=tuple(_site(each, file, model) for each in file.sites)) for file in files]


def _site(each: SavedSite, file: AdapterFile, model: nn.Module) -> SavedSite:
    if each.note is not None:
        return each
    if _INNER in each.path:
        # PEFT 0.21 adds the delta of an attention's out_proj twice; what was trained so is read so
        return replace(each, path=each.path.replace(_INNER, "."), lora_B=each.lora_B * 2)
    name = _parameter(each.stem, file, model)
    return each if name is None else replace(each, path=name, lora=_lora(each, name, file, model))


def _parameter(stem: str, file: AdapterFile, model: nn.Module) -> str | None:
    """Return the raw parameter that a stem stands for: they are nested in the order of registration."""
    owner, depth = split_stem(stem)
    targets = file.parameters
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    names = [dotted(owner, name) for name, parameter in module._parameters.items() if parameter is not None]
    wanted = [name for name in names if any(name == each or name.endswith(f".{each}") for each in targets)]
    position = len(wanted) - 1 - depth
    return wanted[position] if 0 <= position < len(wanted) else None


def _lora(each: SavedSite, name: str, file: AdapterFile, model: nn.Module) -> LoRAConfig:
    assert file.patterns is not None
    parameter = model.get_parameter(name)
    bank = parameter.shape[0] if parameter.dim() == 3 else 1
    alpha = pattern_value(file.patterns.alpha_pattern, name, file.patterns.lora_alpha)
    return replace(each.lora, r=each.lora_A.shape[0] // bank, alpha=alpha, bias=False)


def uses_in_files(files: Sequence[AdapterFile], model: nn.Module, seen: Uses | None) -> Uses | None:
    """Return how the model uses its weights, with what the files tell of raw parameters where no run has shown it."""
    told = dict(use for file in files for each in file.sites for use in _uses(each, model))
    if seen is not None:
        return Uses(seen.calls, {**told, **seen.weights}, seen.complete)
    return Uses({}, told, complete=False) if told else None


def _uses(each: SavedSite, model: nn.Module) -> Iterator[tuple[str, WeightUse]]:
    note = each.note
    if note is not None and (note.parameter or note.read):
        yield (note.parameter or dotted(note.path, "weight")), WeightUse(note.op, note.layout, 1, note.read)
    elif note is None and each.path in dict(model.named_parameters(remove_duplicate=False)):
        parameter = model.get_parameter(each.path)
        owner = model.get_submodule(each.path.rpartition(".")[0])
        layout: Layout = "in_out" if getattr(owner, "is_transposed", False) else "out_in"
        yield each.path, WeightUse("experts" if parameter.dim() == 3 else "matmul", layout, 1, False)
