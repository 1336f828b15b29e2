"""An adapted model → the tensors, the configuration and the metadata that are written for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.attach import Attached, all_attached
from lora_fx.applying import record_in
from lora_fx.checkpoint.fingerprint import sample_values
from lora_fx.checkpoint.header import header_text
from lora_fx.checkpoint.names import METADATA_KEY, PREFIX, anchored, bias_key, factor_key, magnitude_key, target_modules
from lora_fx.errors import AdapterFileError


@dataclass(frozen=True, slots=True)
class Described:
    """One adapter, ready to be written."""

    name: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    metadata: dict[str, str]


def describe(tuned: nn.Module) -> list[Described]:
    """Return what is to be written for every adapter of the model; the model stays unchanged.

    The first carries the modules that are trained whole, and the names of the others.
    """
    record = record_in(tuned)
    groups: dict[str, list[tuple[str, Attached]]] = {}
    for path, found in all_attached(tuned):
        groups.setdefault(found.spec.adapter, []).append((path, found))
    names = sorted(groups, key=lambda name: (name != "default", name))
    described = []
    for name in names:
        first = name == names[0]
        trained = record.trained if first else ()
        described.append(_describe(tuned, name, groups[name], trained, names[1:] if first else []))
    return described


def _describe(
    tuned: nn.Module, name: str, sites: Sequence[tuple[str, Attached]], trained: Sequence[str], others: list[str]
) -> Described:
    _refuse_mixed_dora(name, sites)
    tensors = dict(sorted({**_site_tensors(sites), **_module_tensors(tuned, trained)}.items()))
    config = _config(tuned, sites, trained)
    content = {
        "lora_fx": _version(),
        "adapter": name,
        "others": others,
        "trained": list(trained),
        "model": record_in(tuned).model,
        "rules": record_in(tuned).rules,
        "sites": {
            path: asdict(found.spec.lora) | {"op": found.spec.op, "rule": found.spec.rule} for path, found in sites
        },
        "base": {path: sample_values(found.base_weight) for path, found in sites},
    }
    header = header_text(content, tensors)
    return Described(name, tensors, config, {"format": "pt", METADATA_KEY: header})


def _refuse_mixed_dora(name: str, sites: Sequence[tuple[str, Attached]]) -> None:
    plain = [(path, "plain LoRA") for path, found in sites if not found.spec.lora.dora]
    if plain and len(plain) < len(sites):
        raise AdapterFileError(
            f"adapter '{name}'",
            "mixes DoRA and plain LoRA, for which PEFT's format has one switch",
            plain,
            "give the plain sites an adapter of their own (`adapter:` in the rules)",
        )


def _version() -> str:
    try:
        return version("lora-fx")
    except PackageNotFoundError:  # a checkout on sys.path that was never installed
        return "unknown"


def _site_tensors(sites: Sequence[tuple[str, Attached]]) -> dict[str, Tensor]:
    tensors = {}
    for path, found in sites:
        tensors[factor_key(path, "lora_A")] = _plain(found.lora_A.weight)
        tensors[factor_key(path, "lora_B")] = _plain(found.lora_B.weight)
        if found.magnitude is not None:
            tensors[magnitude_key(path)] = _plain(found.magnitude.weight)
        bias = found.owner._parameters.get("bias")
        if found.spec.lora.bias and bias is not None:
            tensors[bias_key(path)] = _plain(bias)
    return tensors


def _module_tensors(tuned: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{path}.{name}": _plain(tensor)
        for path in trained
        for name, tensor in tuned.get_submodule(path).state_dict().items()
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous()


def _config(tuned: nn.Module, sites: Sequence[tuple[str, Attached]], trained: Sequence[str]) -> dict[str, Any]:
    """Return PEFT's configuration; ranks and alphas that are not the most common go into anchored patterns."""
    loras = {path: found.spec.lora for path, found in sites}
    rslora = all(lora.rslora for lora in loras.values())
    ranks = {path: lora.r for path, lora in loras.items()}
    # PEFT has one switch for rank-stabilised scaling; where only some sites use it, their alpha says the same
    alphas = {p: lora.alpha if lora.rslora == rslora else lora.scaling * lora.r for p, lora in loras.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "alpha_pattern": {anchored(path): value for path, value in sorted(alphas.items()) if value != alpha},
        "base_model_name_or_path": _name_of(tuned),
        "bias": "lora_only" if any(lora.bias for lora in loras.values()) else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": _most_common({path: lora.dropout for path, lora in loras.items()}),
        "modules_to_save": sorted(trained) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {anchored(path): value for path, value in sorted(ranks.items()) if value != rank},
        "target_modules": target_modules(loras, (name for name, _ in tuned.named_modules() if ".lora_" not in name)),
        "task_type": None,
        "use_dora": any(lora.dora for lora in loras.values()),
        "use_rslora": rslora,
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    """Return the most common value, the smallest of them in a tie: the same for the same adapter."""
    counted = Counter(values.values())
    return min(counted, key=lambda value: (-counted[value], value))


def _name_of(tuned: nn.Module) -> str | None:
    """Return where a transformers model came from, as PEFT notes it."""
    try:
        name = tuned.config._name_or_path  # type: ignore[union-attr]
    except AttributeError:
        return None
    return name if isinstance(name, str) and name else None
