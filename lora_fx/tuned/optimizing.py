"""What an optimizer is given: the parameters that are trained, and groups of them with rates of their own."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.trained import parameters_of
from lora_fx.models.fsdp import resharded
from lora_fx.models.wrappers import seen_through
from lora_fx.rules.given import is_number
from lora_fx.tuned.build import trainable
from lora_fx.tuned.several import adapters_called, refuse_trained_together
from lora_fx.tuned.switching import names_of, refuse_unknown, switches_in


def parameters(tuned: nn.Module, adapter: str | None = None) -> Iterator[nn.Parameter]:
    """Return an iterator over what is trained, each once: of adapters, biases, rows, modules under `train:`.

    What was frozen since is among them; `param_groups` leaves it out.  A of LoRA-FA, which is not trained, is not.

    Args:
        tuned: an adapted model, which stays unchanged.
        adapter: name of the only adapter whose parameters are meant; None means all.

    Raises:
        ValueError: no adapter has the name.
        RefusedError: the model is not adapted; or modules were trained whole with this adapter and others together.
    """
    tuned = resharded(seen_through(tuned))  # an optimizer's parameters are shards, also after a forward
    if adapter is None:
        return trainable(tuned)
    known = names_of(switches_in(tuned))
    refuse_unknown([adapter], known)
    if known == (adapter,):
        return trainable(tuned)
    refuse_trained_together(tuned, adapter)
    found = [parameter for _, one in adapters_called(tuned, adapter) for parameter in one.trained()]
    found += parameters_of(tuned, adapter)
    return iter({id(parameter): parameter for parameter in found}.values())


def param_groups(
    tuned: nn.Module,
    adapter: str | None = None,
    *,
    lr: float,
    lora_plus: float | None = None,
    lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer: each trained parameter once, the model stays unchanged.

    >>> import lora_fx
    >>> tuned = lora_fx.apply(nn.Sequential(nn.Linear(3, 5)), r=2, target="*")
    >>> for group in param_groups(tuned, lr=0.01, lora_plus=16):
    ...     print(group["name"], group["lr"])
    A 0.01
    B 0.16

    Each group has `params`, `lr`, `weight_decay` and a `name`: "A", "B" and "embedding" of adapters, "rest" for trained
    biases, DoRA's magnitudes and modules under `train:`; "B no decay" and the like hold what is not decayed.  An empty
    group is left out.

    Args:
        tuned: an adapted model.
        adapter: as for `parameters`.
        lr: learning rate of all but what follows.
        lora_plus: LoRA+: B learns at lora_plus · lr, and adapters of embeddings at `lr_embedding`, as in PEFT's
            `create_loraplus_optimizer`; 16 is usual.  None: all at `lr`.
        lr_embedding: learning rate of adapters of embeddings, A and B, with `lora_plus`.
        weight_decay: of all but biases, magnitudes and the parameters of norms, which have none.

    Raises:
        ValueError: a rate is not a positive number, `weight_decay` is negative, or nothing requires a gradient.
        ValueError, RefusedError: as `parameters`.

    Source: Hayou et al. 2024, arXiv:2402.12354, §4.2 and §5.
    """
    _check_rates(lr, lora_plus, lr_embedding, weight_decay)
    tuned = seen_through(tuned)
    kinds, steady = _kinds(tuned), _norms(tuned) | _lengths(tuned)
    rates = {"A": lr, "B": lr * (lora_plus or 1), "embedding": lr if lora_plus is None else lr_embedding, "rest": lr}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in (one for one in parameters(tuned, adapter) if one.requires_grad):
        kind = kinds.get(id(parameter), "rest")
        decays = parameter.dim() > 1 and id(parameter) not in steady
        name = kind if decays or not weight_decay else f"{kind} no decay"
        decay = weight_decay if decays else 0.0
        group = {"params": [], "lr": rates[kind], "weight_decay": decay, "name": name}
        groups.setdefault(name, group)["params"].append(parameter)
    if not groups:
        raise ValueError("nothing that is trained requires a gradient")
    return list(groups.values())


def _check_rates(lr: float, lora_plus: float | None, lr_embedding: float, weight_decay: float) -> None:
    given = {"lr": lr, "lora_plus": 1.0 if lora_plus is None else lora_plus, "lr_embedding": lr_embedding}
    wrong = [f"{name} is {value!r}" for name, value in given.items() if not is_number(_plain(value), above=0)]
    if weight_decay != 0 and not is_number(_plain(weight_decay), above=0):
        wrong.append(f"weight_decay is {weight_decay!r}")
    if wrong:
        raise ValueError(f"rates must be positive numbers: {', '.join(wrong)}")


def _plain(rate: object) -> object:
    """Return the number that a tensor holds, which torch's optimizers take for a rate."""
    return rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate


def _kinds(tuned: nn.Module) -> dict[int, str]:
    """Return "A", "B" or "embedding" by the id of each factor."""
    kinds: dict[int, str] = {}
    for _, one in all_attached(tuned):
        is_embedding = one.spec.site.op == "embedding"
        kinds[id(one.lora_A.weight)] = "embedding" if is_embedding else "A"
        kinds[id(one.lora_B.weight)] = "embedding" if is_embedding else "B"
    return kinds


def _lengths(tuned: nn.Module) -> set[int]:
    """Return the ids of DoRA's lengths, of which a convolution's have more than one dimension."""
    return {id(one.magnitude.weight) for _, one in all_attached(tuned) if one.magnitude is not None}


def _norms(tuned: nn.Module) -> set[int]:
    """Return the ids of the parameters of normalising modules: torch's own, and classes called so (`LlamaRMSNorm`)."""
    found = (module for module in tuned.modules() if "norm" in type(module).__name__.lower())
    return {id(parameter) for module in found for parameter in module._parameters.values() if parameter is not None}
