"""remerge on whole models: foreign LoRA layers become plain layers, graphs lose their LoRA nodes."""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.errors import LoraFxWarning, MergeError
from lora_fx.models.code import module_of
from lora_fx.models.fsdp import refuse_sharded
from lora_fx.models.modes import normal_tensors
from lora_fx.models.samples import Sample, samples_of
from lora_fx.models.ties import mark_untied, tied_names
from lora_fx.models.torch_internals import pytree
from lora_fx.models.twin import make_twin
from lora_fx.passes.contract import run
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.regions.survey import unchanged_random
from lora_fx.remerging.algebra.operations import NotLinear
from lora_fx.remerging.algebra.running import close
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.modules import candidates, matrices_of, replaced
from lora_fx.remerging.parametrized import parametrized_modules, unparametrized
from lora_fx.text import dotted
from lora_fx.tuned.undo import merged


@dataclass(frozen=True, slots=True)
class RemergeResult(InNotebook):
    """A model without LoRAs, where they went, and what looked like one and is left alone."""

    model: nn.Module
    folded: tuple[str, ...]
    """Paths of the layers (in graphs: of the weights) that took up a product."""
    left: tuple[tuple[str, str], ...]
    """(path, reason) of what was left alone."""

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} folded, {len(self.left)} left alone"]
        return "\n".join([*lines, *(f"  {path}: {reason}" for path, reason in self.left)])


def remerge(model: nn.Module | torch.export.ExportedProgram, example_inputs: object = None) -> nn.Module:
    """Return the model with every LoRA in it folded, of any library; the model itself stays unchanged.

    A LoRA is found by its structure: scaling · B A x (dropout asleep) added to a linear of the same x, or
    scaling · B A added to the weight.  W' = W + Σ scaling · B A, accumulated in float32 and rounded once.  A layer that
    is a linear and its LoRA becomes the plain linear; a GraphModule or ExportedProgram comes back as a GraphModule
    without the nodes.  What looks like a LoRA and is not one is left alone, and a LoraFxWarning gives the reasons;
    `remerged` returns them.

    Args:
        model: any nn.Module (PEFT's comes back as its base model), torch.fx.GraphModule or ExportedProgram.
        example_inputs: as for `plan`; layers are then read from their real calls, and the results are compared.

    Raises:
        MergeError: the folded model computes something else for the example inputs.
        CaptureError: the example inputs are of a wrong kind.
        RefusedError: the model cannot be copied.
    """
    result = remerged(model, example_inputs)
    _warn_of(result)
    return result.model


@normal_tensors()
def remerged(model: nn.Module | torch.export.ExportedProgram, example_inputs: object = None) -> RemergeResult:
    """Return what `remerge` returns, and a report; takes and raises the same, and warns of nothing."""
    module = module_of(model) if isinstance(model, torch.export.ExportedProgram) else model
    if _is_ours(module) and not isinstance(module, fx.GraphModule):
        used = (path for path, one in all_attached(module) if one.spec.record.switch.now().share(one.spec.adapter))
        return RemergeResult(merged(module), tuple(dict.fromkeys(used)), ())
    refuse_sharded(module, "processes hold parts of this model", "fold before fully_shard")
    samples = () if example_inputs is None else samples_of(example_inputs)
    result = _remerged(make_twin(module, freeze=False), _first_calls(module, samples))
    if len(tied_names(result.model)) < len(tied_names(module)):
        mark_untied(result.model)  # or transformers would tie the folded head to the embedding again
    _check(module, result, samples)
    return result


def _is_ours(model: nn.Module) -> bool:
    """Whether lora_fx adapted the model; nothing is asked of modules of other libraries that look like ours."""
    return any(isinstance(module, LoRAFactor) for module in model.modules())


def _remerged(twin: nn.Module, calls: dict[str, Sample]) -> RemergeResult:
    """Fold everything in the twin, in place as far as it is not the whole of it."""
    folded: list[str] = []
    left: dict[str, str] = {}
    _fold_parametrizations(twin, folded, left)
    twin = _fold_layers(twin, calls, folded, left)
    twin = _fold_graphs(twin, folded, left)
    if folded and not left:
        twin = _unwrapped(twin)
    return RemergeResult(twin, tuple(folded), tuple(left.items()))


def _fold_parametrizations(twin: nn.Module, folded: list[str], left: dict[str, str]) -> None:
    for path, names in parametrized_modules(twin):
        full = [dotted(path, name) for name in names]
        try:
            unparametrized(twin, path, names)
        except NotLinear as reason:
            if reason.reason:
                left[full[0]] = reason.reason
        else:
            folded += full


def _fold_layers(twin: nn.Module, calls: dict[str, Sample], folded: list[str], left: dict[str, str]) -> nn.Module:
    done: list[str] = []
    tried: set[frozenset[int]] = set()
    for path in candidates(twin):
        module = twin.get_submodule(path)
        matrices = frozenset(map(id, matrices_of(module)))
        if matrices in tried or any(_is_inside(inner, path) for inner in done):
            continue
        tried.add(matrices)
        outcome = replaced(twin, path, calls.get(path))
        if isinstance(outcome, nn.Module):
            folded.append(path or "(root)")
            twin = _put(twin, module, outcome)
        elif outcome:
            left[path or "(root)"] = outcome
            done.append(path)
    return twin


def _is_inside(inner: str, path: str) -> bool:
    return not path or inner == path or inner.startswith(f"{path}.")


def _put(twin: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Let every parent of the old module hold the new one; return the root."""
    if old is twin:
        return new
    for parent in list(twin.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return twin


def _fold_graphs(twin: nn.Module, folded: list[str], left: dict[str, str]) -> nn.Module:
    for path, module in list(twin.named_modules()):
        if isinstance(module, fx.GraphModule):
            work = Remerge()
            result = run(module, [work])
            folded += [dotted(path, name) for name in work.folded]
            left.update({dotted(path, name): reason for name, reason in work.left})
            if result.modified:
                twin = _put(twin, module, result.graph_module)
    return twin


def _unwrapped(twin: nn.Module) -> nn.Module:
    """Return the model inside one that names its base itself, as PEFT's does."""
    inside = getattr(type(twin), "get_base_model", None)
    base = inside(twin) if callable(inside) else twin
    return base if isinstance(base, nn.Module) and any(base is module for module in twin.modules()) else twin


# -- real calls


def _first_calls(model: nn.Module, samples: Sequence[Sample]) -> dict[str, Sample]:
    """Return for each submodule its first call when the model runs on the samples."""
    calls: dict[str, Sample] = {}
    if not samples:
        return calls
    twin = make_twin(model, freeze=False)
    with contextlib.ExitStack() as stack:
        for path, module in twin.named_modules():

            def note(_module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                calls.setdefault(path, Sample(args, kwargs))

            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        _outputs(twin, samples)
    return calls


def _outputs(model: nn.Module, samples: Sequence[Sample]) -> list[Tensor]:
    """Return all tensors that the model gives for the samples."""
    tensors: list[Tensor] = []
    with torch.no_grad(), unchanged_random(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sample in samples:
            result = model(*sample.args, **sample.kwargs)
            tensors += [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return tensors


def _check(model: nn.Module, result: RemergeResult, samples: Sequence[Sample]) -> None:
    if not result.folded:
        return
    before = _outputs(make_twin(model, freeze=False), samples)
    after = _outputs(make_twin(result.model, freeze=False), samples)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        same = close(other, one, one.dtype) if one.is_floating_point() else torch.equal(one, other)
        if not same:
            raise MergeError(
                "the folded model computes something else for the example inputs",
                [(f"result {number}", f"{tuple(one.shape)} {one.dtype}")],
            )


def _warn_of(result: RemergeResult) -> None:
    """Warn of what is left alone, or that nothing was found."""
    if result.left:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in result.left)
        warnings.warn(f"{len(result.left)} that look like a LoRA are left alone:\n{lines}", LoraFxWarning, stacklevel=3)
    elif not result.folded:
        warnings.warn("no LoRA was found in the model", LoraFxWarning, stacklevel=3)
