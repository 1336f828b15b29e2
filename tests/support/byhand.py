"""LoRA by hand, in plain torch: what a process holds that does with it what others do with lora_fx."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.zoo import Gpt

RANK = 2


class ByHand(nn.Module):
    """A linear layer that is frozen, with pairs of factors by name, of which some are used."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.pairs, self.used = base.requires_grad_(False), nn.ModuleDict(), ["default"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for pair in (self.pairs[name] for name in self.used if name in self.pairs):
            y = y + pair(x)
        return y

    def add(self, name: str) -> None:
        sizes = self.base.in_features, RANK, self.base.out_features
        self.pairs[name] = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))


def adapted() -> nn.Module:
    """Return a model that trains factors of one layer of each block, and can have others on all."""
    model = Gpt(16, 2).requires_grad_(False)
    for block in model.h:
        for name in ("c_attn", "c_proj", "c_fc", "c_out"):
            setattr(block, name, ByHand(getattr(block, name)))
        block.c_attn.add("default")
    return model


def layers(model: nn.Module) -> Iterator[ByHand]:
    return (module for module in model.modules() if isinstance(module, ByHand))


def add(model: nn.Module, path: Path | None, name: str) -> None:
    """Give all layers a pair that is not trained, with values from a file where there is one."""
    for layer in layers(model):
        layer.add(name)
        layer.pairs[name].requires_grad_(False)
    if path is not None:
        swap(model, path, name)


def swap(model: nn.Module, path: Path, name: str) -> None:
    values = load_file(path)
    for number, layer in enumerate(layers(model)):
        layer.pairs[name].load_state_dict({key: values[f"{number}.{key}"] for key in ("0.weight", "1.weight")})


def use(model: nn.Module, *names: str) -> None:
    for layer in layers(model):
        layer.used = [*names]


def save(model: nn.Module, path: Path, name: str) -> None:
    pairs = {number: layer.pairs[name] for number, layer in enumerate(layers(model)) if name in layer.pairs}
    save_file(
        {f"{number}.{key}": value for number, pair in pairs.items() for key, value in pair.state_dict().items()}, path
    )


def rename(model: nn.Module, old: str, new: str) -> None:
    for layer in layers(model):
        layer.pairs[new] = layer.pairs.pop(old)


def drop(model: nn.Module, name: str) -> None:
    for layer in layers(model):
        del layer.pairs[name]


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """Return a copy whose weights have what is used in them."""
    whole = copy.deepcopy(model)
    for block in whole.h:
        for name, layer in [(name, part) for name, part in block.named_children() if isinstance(part, ByHand)]:
            for pair in (layer.pairs[one] for one in layer.used if one in layer.pairs):
                layer.base.weight += pair[1].weight @ pair[0].weight
            setattr(block, name, layer.base)
    return whole
