"""Files → a checked AdapterFile.  Nothing here touches a model, and nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_fx.checkpoint.describe import FORMAT_VERSION, hash_of
from lora_fx.checkpoint.names import (
    CONFIG_FILE,
    METADATA_KEY,
    PREFIX,
    WEIGHTS_FILE,
    bias_key,
    factor_key,
    magnitude_key,
    pattern_value,
    split_factor_key,
)
from lora_fx.errors import AdapterFileError
from lora_fx.rules import LoRAConfig


@dataclass(frozen=True, slots=True)
class SavedSite:
    """One site of an adapter file."""

    path: str
    lora: LoRAConfig
    rule: str
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    """DoRA's lengths."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One adapter, read and checked in itself."""

    folder: Path
    name: str
    sites: tuple[SavedSite, ...]
    modules: dict[str, Tensor]
    """Tensors of the modules that are trained whole, by their name in the model."""
    trained: tuple[str, ...]
    rules: dict[str, Any] = field(default_factory=dict)
    base: dict[str, list[float] | None] = field(default_factory=dict)
    """A few values of each base weight, where lora_fx wrote the file."""


def read_adapters(directory: str | os.PathLike[str]) -> list[AdapterFile]:
    """Return the adapter of a directory, and those that were saved with it, checked in themselves.

    Raises:
        AdapterFileError: missing, truncated, damaged, foreign or contradictory files; says which and how.
    """
    folder = Path(directory)
    first, others = _read(folder)
    return [first, *(_read(folder / name)[0] for name in others)]


def _read(folder: Path) -> tuple[AdapterFile, list[str]]:
    config = _read_config(folder)
    tensors, metadata = _read_tensors(folder / WEIGHTS_FILE)
    extra = _our_metadata(folder / WEIGHTS_FILE, metadata, tensors)
    _refuse_config(folder / CONFIG_FILE, config)
    file = _AdapterReader(folder, config, tensors, extra).read()
    return file, list(extra.get("others", []))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    _must_exist(folder, path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(str(path), f"is not JSON: {error}", advice="it may be cut off") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterFileError(str(path), "is not the configuration of a LoRA adapter", [("peft_type", repr(found))])
    return config


def _must_exist(folder: Path, path: Path) -> None:
    if path.is_file():
        return
    inside = sorted(each.parent.name for each in folder.glob(f"*/{CONFIG_FILE}"))
    advice = f"these folders in it hold one: {', '.join(inside)}" if inside else "give the directory of an adapter"
    raise AdapterFileError(str(path), "does not exist", advice=advice)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        old = path.with_name("adapter_model.bin")
        advice = (
            "it has only adapter_model.bin, a pickle, which is not read: convert it with PEFT" if old.is_file() else ""
        )
        raise AdapterFileError(str(path), "does not exist", advice=advice)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            str(path), f"cannot be read: {error}", advice="the file is cut off or damaged; copy it again"
        ) from error


def _our_metadata(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what lora_fx wrote beside the tensors, {} for a file of PEFT's; checks the hash it notes."""
    if METADATA_KEY not in metadata:
        return {}
    try:
        extra = json.loads(metadata[METADATA_KEY])
        version, noted = extra["format"], extra["sha256"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise AdapterFileError(str(path), "has a damaged header", [(METADATA_KEY, str(error))]) from error
    if version != FORMAT_VERSION:
        facts = [("written as format", str(version)), ("this lora_fx reads", str(FORMAT_VERSION))]
        raise AdapterFileError(
            str(path), "is of another format", facts, "use the lora_fx that wrote it, or a newer one"
        )
    found = hash_of(tensors)
    if found != noted:
        facts = [("SHA-256 when written", noted), ("SHA-256 now", found)]
        raise AdapterFileError(str(path), "is damaged: its contents have changed since they were written", facts)
    return dict(extra)


_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED_SETTINGS = {
    "lora_bias": "a bias on lora_B",
    "layer_replication": "layer replication",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "adapted raw parameters",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}


def _refuse_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would be silently wrong if it were read as plain LoRA."""
    facts = [(key, name) for key, name in _REFUSED_SETTINGS.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        facts.append(("init_lora_weights", f"{init!r} changes the base weights; convert it to plain LoRA with PEFT"))
    if config.get("bias", "none") == "all":
        facts.append(("bias", "'all' changes biases that belong to no adapted site"))
    if facts:
        raise AdapterFileError(str(path), "asks for what lora_fx does not read", facts)


@dataclass(frozen=True, slots=True)
class _AdapterReader:
    """Turns tensors and configuration into sites, checking one against the other."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Any]

    def read(self) -> AdapterFile:
        paths = sorted({split[0] for key in self.tensors if (split := split_factor_key(key))})
        self._check(paths)
        return AdapterFile(
            folder=self.folder,
            name=self.extra.get("adapter", "default"),
            sites=tuple(self._site(path) for path in paths),
            modules={key.removeprefix(PREFIX): tensor for key, tensor in self._module_tensors().items()},
            trained=tuple(self.config.get("modules_to_save") or ()),
            rules=self.extra.get("rules", {}),
            base=self.extra.get("base", {}),
        )

    @property
    def _weights(self) -> str:
        return str(self.folder / WEIGHTS_FILE)

    def _check(self, paths: list[str]) -> None:
        facts = [fact for path in paths for fact in self._site_problems(path)]
        if not paths:
            facts.append(("(file)", "has no lora_A or lora_B"))
        facts += [(key, "is of no kind that lora_fx knows") for key in self._unknown(paths)]
        facts += [
            (path, "is in the header but not in the file") for path in self.extra.get("sites", {}) if path not in paths
        ]
        facts += [(f"target_modules {name}", "has no tensors in the file") for name in self._lost_targets(paths)]
        facts += [(key, problem) for key, t in self.tensors.items() if (problem := _value_problem(t))]
        if facts:
            raise AdapterFileError(self._weights, "is not a usable adapter", facts)

    def _site_problems(self, path: str) -> Iterator[tuple[str, str]]:
        keys = [factor_key(path, factor) for factor in ("lora_A", "lora_B")]
        missing = [key for key in keys if key not in self.tensors]
        if missing:
            yield missing[0], "is missing"
            return
        lora_a, lora_b = (self.tensors[key] for key in keys)
        if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
            yield path, f"lora_A {list(lora_a.shape)} and lora_B {list(lora_b.shape)} do not multiply"
        elif bool(self.config.get("use_dora")) != (magnitude_key(path) in self.tensors):
            yield magnitude_key(path), "is missing" if self.config.get("use_dora") else "is there without use_dora"
        elif (rank := self._configured_rank(path)) != lora_a.shape[0]:
            yield path, f"has rank {lora_a.shape[0]}, {CONFIG_FILE} says {rank:g}"

    def _lost_targets(self, paths: list[str]) -> list[str]:
        """Return the targets that the configuration lists and no tensor belongs to."""
        targets = self.config.get("target_modules")
        if not isinstance(targets, list):  # an expression, or a name such as "all-linear"
            return []
        return [name for name in targets if not any(path == name or path.endswith(f".{name}") for path in paths)]

    def _unknown(self, paths: list[str]) -> list[str]:
        known = {factor_key(path, factor) for path in paths for factor in ("lora_A", "lora_B")}
        known |= {key(path) for path in paths for key in (bias_key, magnitude_key)} | set(self._module_tensors())
        return [key for key in self.tensors if key not in known]

    def _module_tensors(self) -> dict[str, Tensor]:
        trained = tuple(f"{PREFIX}{path}." for path in self.config.get("modules_to_save") or ())
        return {key: tensor for key, tensor in self.tensors.items() if trained and key.startswith(trained)}

    def _configured_rank(self, path: str) -> float:
        return pattern_value(self.config.get("rank_pattern") or {}, path, self.config.get("r", 8))

    def _site(self, path: str) -> SavedSite:
        saved = self.extra.get("sites", {}).get(path)
        lora = self._lora_of_config(path) if saved is None else _lora_of(saved)
        self._must_agree(path, lora)
        return SavedSite(
            path=path,
            lora=lora,
            rule="" if saved is None else saved.get("rule", ""),
            lora_A=self.tensors[factor_key(path, "lora_A")],
            lora_B=self.tensors[factor_key(path, "lora_B")],
            bias=self.tensors.get(bias_key(path)),
            magnitude=self.tensors.get(magnitude_key(path)),
        )

    def _lora_of_config(self, path: str) -> LoRAConfig:
        return LoRAConfig(
            r=int(self._configured_rank(path)),
            alpha=pattern_value(self.config.get("alpha_pattern") or {}, path, self.config.get("lora_alpha", 8)),
            dropout=self.config.get("lora_dropout") or 0.0,
            rslora=bool(self.config.get("use_rslora")),
            dora=magnitude_key(path) in self.tensors,
            bias=bias_key(path) in self.tensors,
        )

    def _must_agree(self, path: str, lora: LoRAConfig) -> None:
        """The configuration, which other tools read, must scale as the header says."""
        configured = self._lora_of_config(path)
        if abs(configured.scaling - lora.scaling) > 1e-6 * lora.scaling:
            facts = [("scaling by the header", f"{lora.scaling:g}"), (f"by {CONFIG_FILE}", f"{configured.scaling:g}")]
            raise AdapterFileError(self._weights, f"contradicts {CONFIG_FILE} at {path}", facts)


def _lora_of(saved: Mapping[str, Any]) -> LoRAConfig:
    names = {each.name for each in fields(LoRAConfig)}
    return LoRAConfig(**{key: value for key, value in saved.items() if key in names})


def _value_problem(tensor: Tensor) -> str | None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return "has NaN or infinite values"
    return None
