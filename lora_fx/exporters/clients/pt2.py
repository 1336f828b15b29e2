"""Loads a program, puts in the base's values and then all adapters'; as torch.export runs it and as it was compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_fx.exporters.clients.job import outputs

Put = Callable[[Mapping[str, Tensor]], object]


def work(given: dict[str, Any]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return, for every program, the outputs with the base's values and with the adapters'."""
    base = load_file(given["base"])
    adapters = {name: value for path in given["adapters"] for name, value in load_file(path).items()}
    return [_base_and_adapted(path, base, adapters, given["sample"]) for path in given["programs"]]


def _base_and_adapted(
    path: str, base: Mapping[str, Tensor], adapters: Mapping[str, Tensor], sample: Any
) -> tuple[list[Tensor], list[Tensor]]:
    run_it, put = _compiled(path) if path.endswith(".aoti.pt2") else _exported(path)
    put(base)
    before = outputs(run_it, sample)
    put(adapters)
    return before, outputs(run_it, sample)


def _exported(path: str) -> tuple[Callable[..., Any], Put]:
    module = torch.export.load(path).module()
    return module, lambda values: module.load_state_dict(dict(values), strict=False)


def _compiled(path: str) -> tuple[Callable[..., Any], Put]:
    # torch documents this as the way to load what AOTInductor has compiled; a client imports nothing else of lora_fx
    package: Any = importlib.import_module("torch._inductor").aoti_load_package(path)
    known = set(package.get_constant_fqns())

    def put(values: Mapping[str, Tensor]) -> None:
        missing = sorted(set(values) - known)
        if missing:
            raise KeyError(f"the compiled program has no {missing}")
        package.load_constants(dict(values), check_full_update=False)

    return package, put
