"""PEFT on the same base, with the same adapters; what it would compute otherwise is refused by name."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.bench.subjects import PEFT, FrozenBase, Subject, floating
from lora_fx.errors import InvariantError, LoraFxError, RefusedError
from lora_fx.exporters.peft import refused
from lora_fx.files.adapter.describe import Described, describe
from lora_fx.models.twin import make_twin

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.4}
"""Largest difference over the largest value.  Sums are formed in another order; in half precision each product, scaling
and sum is rounded to three digits, or two, PEFT and lora_fx round at different places, and layers pass it on.  With
another scaling, or with a site left out, gradients of factors differ by about as much as they are."""


def require_peft() -> None:
    """Raise LoraFxError if PEFT is not installed."""
    if find_spec("peft") is None:
        raise LoraFxError("comparing with PEFT needs it: pip install 'lora-fx[export]'")


def peft_subject(base: FrozenBase, tuned: nn.Module) -> Subject:
    """Return PEFT's model of the base, as `peft_model` makes it, as a subject in train mode."""
    model = peft_model(base.model, tuned)
    inner = base.subject(PEFT, model.get_base_model())
    return Subject(PEFT, model.train(), inner.sample, inner.leaf)


def peft_model(model: nn.Module, tuned: nn.Module) -> Any:
    """Return PEFT's model with the adapters of ours: same sites, ranks, scalings, dropout and values.

    Half precision bases have adapters in float32, which is PEFT's default and ours.

    Args:
        model: the base; stays unchanged, and shares its storage.
        tuned: the base with adapters of ours.

    Raises:
        LoraFxError: PEFT is not installed.
        RefusedError: it would compute something else; names every such site.
    """
    require_peft()
    _check(tuned)
    import peft

    described = describe(tuned)[0]
    config = peft.LoraConfig(**{**described.config, "inference_mode": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transposed and of tied weights, which are as they should be
        adapted: Any = peft.get_peft_model(make_twin(model), config)
        loaded: Any = peft.set_peft_model_state_dict(adapted, described.tensors)
    _check_loaded(described, adapted, loaded.unexpected_keys)
    return adapted


def _check(tuned: nn.Module) -> None:
    sites = list(all_attached(tuned))
    refusals = dict(refused(tuned))
    refusals |= {path: "PEFT cannot adapt parts of a weight" for path, adapter in sites if adapter.spec.parts}
    dropouts = {adapter.spec.lora.dropout for _, adapter in sites}
    if len(dropouts) > 1:
        refusals |= {path: f"dropout {adapter.spec.lora.dropout}: PEFT has one for all" for path, adapter in sites}
    if dropouts - {0.0}:
        raw = [path for path, adapter in sites if not adapter.spec.path_is_owner]
        refusals |= dict.fromkeys(raw, "PEFT has no dropout on raw parameters")
    if len({adapter.spec.adapter for _, adapter in sites}) > 1:
        refusals |= {path: f"adapter '{adapter.spec.adapter}': only one is compared" for path, adapter in sites}
    if refusals:
        raise RefusedError(
            "PEFT cannot be compared with these rules",
            [(path, reason.partition("; merged weights")[0]) for path, reason in refusals.items()],
            "leave these sites out, or compare without --peer",
        )


def _check_loaded(described: Described, model: nn.Module, unexpected: list[str]) -> None:
    adapted = sum(".lora_" in name for name, _ in model.named_parameters())
    wanted = sum(".lora_" in name for name in described.tensors)
    if unexpected or adapted != wanted:
        taken = (f"{len(described.tensors)} tensors", f"PEFT has taken them for {adapted} factors")
        raise InvariantError("PEFT has adapted other sites", [taken, *((name, "left over") for name in unexpected)])


def check_parity(ours: Subject, theirs: Subject) -> float:
    """Return the largest difference of outputs and of gradients (input, factors), each over its own largest value.

    Both are compared without dropout, and are in train mode again afterwards.

    Raises:
        InvariantError: they differ by more than the dtype explains; names what does.
    """
    mine, others = _observed(ours), _observed(theirs)
    largest, wrong = 0.0, []
    for name in mine.keys() & others.keys():
        a, b = mine[name], others[name]
        if a.shape != b.shape:  # of a convolution's factors, or those of groups
            continue
        scale = b.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        difference = float((a - b).abs().max() / scale)
        largest = max(largest, difference)
        if not difference <= _tolerance(ours.model):
            wrong.append((name, f"differs by {difference:.1e} of its largest value"))
    if wrong:
        raise InvariantError("lora_fx and PEFT do not compute the same, so their times mean nothing", sorted(wrong))
    return largest


def _observed(subject: Subject) -> dict[str, Tensor]:
    """Return outputs, and gradients by parameter's name, of a step without dropout."""
    subject.model.eval()
    with torch.no_grad():
        output = subject.model(*subject.sample.args, **subject.sample.kwargs)
    subject.step()
    values = {f"output {number}": tensor for number, tensor in enumerate(floating(output))}
    values |= dict(_gradients(subject))
    subject.model.train()
    subject.model.zero_grad(set_to_none=True)
    return {name: tensor.detach().double() for name, tensor in values.items()}


def _gradients(subject: Subject) -> Iterator[tuple[str, Tensor]]:
    if subject.leaf is not None and subject.leaf.grad is not None:
        yield "gradient of the input", subject.leaf.grad
    for name, parameter in subject.model.named_parameters():
        if parameter.grad is not None and ".lora_" in name:
            yield f"gradient of {name.removeprefix('base_model.model.')}", parameter.grad


def _tolerance(model: nn.Module) -> float:
    """Return the tolerance of the least precise of the dtypes of a model's floating point parameters."""
    return max(TOLERANCE[weight.dtype] for weight in model.parameters() if weight.dtype in TOLERANCE)
