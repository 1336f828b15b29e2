"""What PEFT chooses in a model, as the sites of lora_fx, and configurations drawn at random."""

from __future__ import annotations

import copy
import random
from typing import Any

import peft
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from lora_fx.discovery.sites import take_inventory
from lora_fx.planning.decide import decide
from lora_fx.rules.reader import read_rules

Choice = tuple[dict[str, tuple[int, float]], set[str]]
"""Rank and scaling by the weight of each site, and the modules trained whole."""


def of_peft(model: nn.Module, config: peft.LoraConfig) -> Choice:
    """Return what PEFT adapts and trains whole in a copy of the model."""
    twin = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).base_model.model
    sites: dict[str, tuple[int, float]] = {}
    for path, module in twin.named_modules():
        if isinstance(module, LoraLayer) and not path.endswith("base_layer.out_proj"):
            path = path.replace(".base_layer", "")
            facts = module.r["default"], module.scaling["default"]
            names = ["weight"]
            if isinstance(module, MultiheadAttention):
                names = ["in_proj_weight", "out_proj.weight"]
            elif isinstance(module, ParamWrapper):
                names = [module.parameter_name]
            sites |= {f"{path}.{name}": facts for name in names}
    whole = {path for path, module in twin.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    return sites, whole


def of_rules(model: nn.Module, rules: dict[str, Any], strict: bool = True) -> Choice:
    """Return what rules adapt, or would if the site could be, and train whole."""
    read = read_rules(rules)
    loras = {rule.name: rule.lora for rule in read.rules}
    decisions = decide(read, take_inventory(model), strict)
    decided = [(site.site.weight, loras[site.rule]) for site in decisions.sites if site.rule is not None]
    sites = {weight: (lora.r, lora.scaling) for weight, lora in decided if lora is not None}
    return sites, {module.path for module in decisions.train}


def drawn(seed: int, model: nn.Module) -> peft.LoraConfig:
    """Return a configuration drawn at random for the names of a model; the same for the same seed."""
    draw = random.Random(seed)
    layers = [path for path, module in model.named_modules() if path and isinstance(module, nn.Linear | nn.Embedding)]
    attentions = [path for path, module in model.named_modules() if path and isinstance(module, nn.MultiheadAttention)]
    layers = [path for path in layers if not path.startswith(tuple(f"{name}." for name in attentions))] + attentions
    banks = [name for name, parameter in model.named_parameters() if parameter.dim() == 3]

    def end() -> str:
        parts = draw.choice(layers).split(".")
        return ".".join(parts[-draw.randint(1, len(parts)) :])

    def ends(most: int) -> list[str]:
        return sorted({end() for _ in range(draw.randint(1, most))})

    def patterns(values: list[int]) -> dict[str, int]:
        keys = [draw.choice(["", "^"]) + end() if draw.random() < 0.8 else rf".*\.{end()}" for _ in range(2)]
        return {key: draw.choice(values) for key in keys} if draw.random() < 0.5 else {}

    settings: dict[str, Any] = {"r": draw.choice([2, 4]), "lora_alpha": draw.choice([4, 16])}
    form = draw.choice(["ends", "ends", "ends", "layers", "expression", "all-linear", "banks"])
    if form == "expression":
        settings["target_modules"] = rf"{draw.choice(['', '^'])}(.*\.)?({'|'.join(ends(3))}){draw.choice(['', '$'])}"
    elif form == "all-linear":
        settings["target_modules"] = "all-linear"
    else:
        settings["target_modules"] = ends(3)
    if form == "layers":
        settings["layers_to_transform"] = draw.choice([0, [1], [0, 1]])
        settings["layers_pattern"] = draw.choice([None, None, "layers", ["h", "layer"]])
    if form == "banks" and banks:
        settings["target_parameters"] = sorted({draw.choice(banks).split(".", draw.randint(0, 3))[-1]})
    if draw.random() < 0.3:
        settings["exclude_modules"] = ends(2) if draw.random() < 0.6 else rf".*{end()}"
    if draw.random() < 0.3:
        settings["modules_to_save"] = ends(2)
    settings["use_rslora"] = draw.random() < 0.2
    return peft.LoraConfig(**settings, rank_pattern=patterns([1, 3]), alpha_pattern=patterns([2, 8]))
