"""Run a model on samples and see which of its submodules become graphs."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.surroundings import RandomState
from lora_fx.capture.symbolic import capture_symbolically
from lora_fx.regions.candidates import block_regions, inner_regions
from lora_fx.regions.install import Library, install, library_of, regions, uninstall
from lora_fx.regions.structure import structure_of
from lora_fx.samples import Sample

MODES = ((False, False), (True, True))
"""(training, grad mode) of the runs: as in inference, and as in training."""


@dataclass(slots=True)
class Survey:
    """What was found out about a model."""

    graphs: tuple[str, ...]
    """Paths of the regions that run as graphs."""
    failures: dict[str, str]
    """Why a submodule does not run as a graph, or not in every mode."""
    calls: dict[str, int]
    """How often one forward calls each submodule."""
    library: Library
    structures: dict[str, tuple[Any, ...]]
    """For each region, the structure of its block."""
    seconds: float = 0.0


def survey(twin: nn.Module, samples: Sequence[Sample], sites: Sequence[str]) -> Survey:
    """Return which submodules of the twin run as graphs for the samples, in eval and in train mode.

    The twin is used up: its buffers change and regions stay installed on it.

    Args:
        twin: a frozen twin of the model to study.
        samples: inputs; every one is run in both modes.
        sites: paths of the weights for whose sake graphs are wanted.

    Raises:
        Exception: whatever the model raises for the samples in eval mode.
    """
    calls = count_calls(twin, samples[0])
    failures: dict[str, str] = {}
    tried = block_regions(twin, sites)
    install(twin, tried)
    while tried:
        run_modes(twin, samples)
        tried = _retreat(twin, sites, failures)
    found = {path: structure_of(module) for path, module, _ in regions(twin)}
    seconds = sum(region.seconds for _, _, region in regions(twin))
    return Survey(tuple(found), failures, calls, library_of(twin), dict(found), seconds)


def survey_symbolically(twin: nn.Module, sites: Sequence[str]) -> Survey:
    """Return which submodules of the twin run as graphs, found without inputs: straight-line forwards only."""
    library: Library = {}
    structures: dict[str, tuple[Any, ...]] = {}
    failures: dict[str, str] = {}
    waiting = block_regions(twin, sites)
    while waiting:
        path = waiting.pop(0)
        structure = structure_of(twin.get_submodule(path))
        try:
            if structure not in library:
                library[structure] = [capture_symbolically(twin.get_submodule(path))]
            structures[path] = structure
        except NotCaptured as reason:
            failures[path] = str(reason)
            waiting += inner_regions(twin, path, sites)
    return Survey(tuple(structures), failures, {}, library, structures)


def _retreat(twin: nn.Module, sites: Sequence[str], failures: dict[str, str]) -> list[str]:
    """Take off the regions that became no graph; return the smaller ones that were put on inside them."""
    smaller = []
    for path, module, region in list(regions(twin)):
        if region.kind.failures:
            failures[path] = "; ".join(dict.fromkeys(region.kind.failures.values()))
        if region.mine:
            continue
        if not region.misses:
            failures[path] = "never called"
        uninstall(module)
        if region.misses:
            smaller += inner_regions(twin, path, sites)
    install(twin, smaller)
    return smaller


def run_modes(model: nn.Module, samples: Sequence[Sample]) -> None:
    """Run every sample in eval and in train mode; random state and modes are as before afterwards."""
    with unchanged_modes(model), unchanged_random(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model, about runs that the user has not asked for
        for training, grad in MODES:
            model.train(training)
            for sample in samples:
                with torch.set_grad_enabled(grad), contextlib.ExitStack() as stack:
                    if training:  # some models refuse to train on such a batch; the user will not either
                        stack.enter_context(contextlib.suppress(Exception))
                    model(*sample.args, **sample.kwargs)


def count_calls(model: nn.Module, sample: Sample) -> dict[str, int]:
    """Return how often a forward in eval mode calls each submodule."""
    calls: dict[str, int] = {}
    hooks = []
    for path, module in model.named_modules():

        def count(_module: nn.Module, _args: object, path: str = path) -> None:
            calls[path] = calls.get(path, 0) + 1

        hooks.append(module.register_forward_pre_hook(count))
    try:
        with unchanged_modes(model), unchanged_random(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.eval()
            model(*sample.args, **sample.kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextlib.contextmanager
def unchanged_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def unchanged_random(model: nn.Module) -> Iterator[None]:
    """Give torch's and Python's generators their state back."""
    state, luck = RandomState(tuple({p.device for p in model.parameters()})), random.getstate()
    try:
        yield
    finally:
        state.restore()
        random.setstate(luck)
