"""Which linears make logits that only a loss reads: seen in a run of the samples, and proven, before they are late."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.adapters.fused.terms import product_dtype
from lora_fx.adapters.selection import acting_everywhere
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.liveness.heads import LATE, LateHead, LateState, install, late_modules, named_head, uninstall, wide_linears
from lora_fx.liveness.rows import LazyRows, whole
from lora_fx.liveness.sources import LazyValue
from lora_fx.models.samples import Sample
from lora_fx.models.twin import is_meta
from lora_fx.regions.checking import with_noise
from lora_fx.regions.gradients import Run, gradients_differ, values_differ
from lora_fx.regions.program import LOSS
from lora_fx.regions.survey import trial_twin, unchanged_modes

REFUSED = "lora_fx_late_refused"
"""Attribute of a model: why nothing is late in it."""
_ROWS = 48
"""How many rows of logits are compared."""


def install_late(
    twin: nn.Module, samples: Sequence[Sample], graphs: Sequence[str], passes: Sequence[str]
) -> Sequence[str]:
    """Let the linear that makes the logits of the twin compute them when they are asked for, in place.

    Why it does not is noted in the twin (`late_refusals`).

    Args:
        twin: an adapted model, without regions yet.
        samples: to see it in; with none, the model may say itself which linear it is.
        graphs: paths of the submodules that are to run as graphs.
        passes: names of the optimisations that are wanted.

    Returns:
        The paths of those that still can: a graph of what holds the linear would compute the logits itself.
    """
    if LOSS not in passes:
        return graphs
    if "" in graphs:
        refused = {"": "the whole model runs as one graph"}
    elif is_meta(twin):
        refused = {"": "on the meta device nothing can be compared"}
    else:
        refused = _install_found(twin, samples)
    if refused:
        twin.__dict__[REFUSED] = refused
    heads = [state.path for _, state in late_modules(twin)]
    return [path for path in graphs if not any(head.startswith(f"{path}.") for head in heads)]


def late_refusals(model: nn.Module) -> dict[str, str]:
    """Return why nothing is computed late in a model that was to, by path; "" stands for the whole model."""
    refused: dict[str, str] = model.__dict__.get(REFUSED, {})
    return refused


def _install_found(twin: nn.Module, samples: Sequence[Sample]) -> dict[str, str]:
    """Let what is found compute late, in place; return why others do not."""
    with trial_twin(twin, freeze=False) as copy:
        found = _found(copy, samples)
        refused = {path: reason for path, reason in found.items() if reason}
        for path in found.keys() - refused.keys():
            reason = _difference(copy.get_submodule(path))
            if reason:
                refused[path] = reason
    for path in found.keys() - refused.keys():
        install(twin.get_submodule(path), LateHead, LateState(path))
    return refused or ({} if found else {"": "no linear makes what only a loss reads, or the model returns"})


def _found(copy: nn.Module, samples: Sequence[Sample]) -> dict[str, str]:
    """Return the paths of the linears that make logits, each with why they cannot be late, or nothing."""
    tried = wide_linears(copy) if samples else named_head(copy)
    for path, module in tried.items():
        install(module, LateHead, LateState(path, made=[]))
    found: dict[str, str] = {}
    for sample in samples:
        for path, reason in _run(copy, sample).items():
            found[path] = found.get(path, reason) and reason
    if not samples:
        return dict.fromkeys(tried, "")
    # of the one that the model names, why it was not late is of interest
    named = named_head(copy) if not found else {}
    return found or {
        p: next(iter(m.__dict__[LATE].otherwise), "") for p, m in named.items() if m.__dict__[LATE].otherwise
    }


def _run(copy: nn.Module, sample: Sample) -> dict[str, str]:
    """Run a sample; return the paths of the linears whose output a loss met or it returned, and what speaks against.

    In eval mode, with gradients: dropout changes nothing, and no statistics.
    """
    states = {state.path: state for _, state in late_modules(copy)}
    for state in states.values():
        state.made, state.otherwise = [], type(state.otherwise)()
    with unchanged_modes(copy), warnings.catch_warnings(), torch.enable_grad(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        copy.eval()
        with acting_everywhere():
            result = copy(*sample.args, **sample.kwargs)
        returned = {id(value) for t in tensors_in(result) if type(t) is LazyRows for value in t.lazy_value.chain()}
        return dict(_judged(states.values(), returned))
    return {}


def _judged(states: Any, returned: set[int]) -> Iterator[tuple[str, str]]:
    for state in states:
        made: list[LazyValue] = state.made
        wanted = [value for value in made if id(value) in returned or value.taken]
        if any(value.made is None for value in wanted):
            yield state.path, ""
        elif wanted:
            yield state.path, "the model reads its output itself"


def _difference(head: Any) -> str:
    """Return how the loss of late logits and its gradients differ from those of eager ones beyond rounding."""
    state: LateState = head.__dict__[LATE]
    weight = head._parameters["weight"]
    generator = torch.Generator().manual_seed(0)
    if state.given is None:
        x = torch.randn((_ROWS, head.in_features), generator=generator).to(weight)
    else:
        given = whole(state.given) if type(state.given) is LazyRows else state.given
        x = given.detach().reshape(-1, head.in_features)[:_ROWS].clone()
    labels = torch.randint(0, head.out_features, (len(x),), generator=generator)
    labels[1::3] = -100
    with_noise(head.eval())
    runs: list[Run] = []
    for late in (True, False):
        state.enabled, before = late, state.calls
        rows = x.clone().requires_grad_()
        with torch.enable_grad():
            logits = head(rows)
            logits = logits if logits.dtype is torch.float64 else logits.float()
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.to(x.device), label_smoothing=0.1)
        if late and state.calls == before:
            return next(iter(state.otherwise), "the call was not late")
        runs.append((loss, ((rows,), {}), head))
    precision = max((x.dtype, product_dtype(x), weight.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return values_differ(runs[0][0], runs[1][0], precision) or gradients_differ(runs[0], runs[1], precision) or ""


def uninstall_late(model: nn.Module) -> None:
    """Let all modules compute their output when they are called, in place."""
    model.__dict__.pop(REFUSED, None)
    for module, _ in late_modules(model):
        uninstall(module)
