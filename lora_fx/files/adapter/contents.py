"""What an adapter's directory says of itself: configuration and header are read, no tensor is.  No torch here."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from lora_fx.errors import AdapterFileError, MergeError
from lora_fx.files.adapter.configuration import Configuration, read_configuration
from lora_fx.files.adapter.folder import file_in
from lora_fx.files.adapter.names import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    factor_keys,
    is_of_training,
    pattern_name,
    split_factor_key,
    stems_in,
)
from lora_fx.files.adapter.noted import Header, noted_in
from lora_fx.files.safetensors import RawFile, read_raw
from lora_fx.planning.rows import fold_rows
from lora_fx.rules.inits import is_moved
from lora_fx.text import columns, count, json_text, listing, thousands, visible


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """One site of an adapter on disk."""

    path: str
    r: int
    scaling: float
    shape: tuple[int, ...]
    """(out, in) of the product; of a convolution or a bank, as PEFT writes it."""
    dtype: str
    parameters: int
    rule: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What `lora-fx inspect` tells of an adapter's directory."""

    folder: str
    writer: str
    adapter: str
    base: str
    """The model that it was trained on, as far as the files name it."""
    fingerprint: str
    """Over the values of the base weights that the header notes; empty where it notes none."""
    noted: int
    """Number of base weights whose values are noted."""
    sites: tuple[SavedAdapter, ...]
    modules: dict[str, int]
    """Other tensors (modules trained whole, biases) with their numbers of parameters."""
    features: tuple[str, ...]
    """What is not plain LoRA."""
    others: tuple[str, ...]
    """Adapters that were saved with it, in directories of their names."""
    bytes: int

    @property
    def parameters(self) -> int:
        """Number of parameters of all sites and of the modules trained whole."""
        return sum(site.parameters for site in self.sites) + sum(self.modules.values())

    def __str__(self) -> str:
        rows = [
            (s.path, f"{s.shape[1]} → {s.shape[0]}", f"r={s.r} scaling={s.scaling:g}", s.dtype, s.rule)
            for s in self.sites
        ]
        whole = [f"  also holds: {visible(name)}, {count(size, 'parameter')}" for name, size in self.modules.items()]
        sums = f"{count(len(self.sites), 'site')}, {count(self.parameters, 'parameter')}, {thousands(self.bytes)} bytes"
        return "\n".join([self.folder, columns(self._facts()), "", columns(fold_rows(rows)), *whole, "", sums])

    def _facts(self) -> list[tuple[str, str]]:
        noted = f"{self.fingerprint} (values of {count(self.noted, 'base weight')})" if self.noted else "not noted"
        facts = [("written by", self.writer), ("adapter", self.adapter), ("trained on", self.base)]
        facts += [("base values", noted), ("beyond plain LoRA", listing(self.features) if self.features else "nothing")]
        return facts + ([("saved with it", listing(self.others))] if self.others else [])

    def document(self) -> dict[str, object]:
        """Return the contents as JSON has them."""
        return {"schema_version": 1, **asdict(self), "parameters": self.parameters}

    def to_json(self) -> str:
        """Return the contents as JSON."""
        return json_text(self.document(), indent=1)


def contents_of(directory: str | os.PathLike[str]) -> Contents:
    """Return what the files of an adapter say; values are not looked at (`lora_fx.load` checks them).

    Raises:
        AdapterFileError: a file is missing, damaged or of another kind.
    """
    folder = Path(directory)
    config_file = file_in(folder, CONFIG_FILE)
    config = read_configuration(config_file)
    raw = _raw(file_in(folder, WEIGHTS_FILE))
    header, content = noted_in(raw.path, raw.metadata) or (Header("default"), {})
    return Contents(
        folder=str(folder),
        writer=_writer(content, config),
        adapter=header.adapter,
        base=config.base or _text(content.get("model")) or "unknown",
        fingerprint=hashlib.sha256(json.dumps(header.base, sort_keys=True).encode()).hexdigest()[:16]
        if header.base
        else "",
        noted=sum(values is not None for values in header.base.values()),
        sites=tuple(_site(stem, raw, config, header) for stem in stems_in(raw.tensors)),
        modules=_modules(raw),
        features=tuple(_features(config, header)),
        others=header.others,
        bytes=raw.size + config_file.stat().st_size,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _raw(path: Path) -> RawFile:
    try:
        return read_raw(path)
    except MergeError as error:
        raise AdapterFileError(str(path), str(error).removeprefix(f"{path}: ")) from error


def _writer(content: Mapping[str, Any], config: Configuration) -> str:
    if content:
        return f"lora_fx {_text(content.get('lora_fx'))}, format {content['format']}".replace("  ", " ")
    return f"PEFT {config.peft_version}".strip() if config.peft_version else "PEFT, or a tool that writes like it"


def _site(stem: str, raw: RawFile, config: Configuration, header: Header) -> SavedAdapter:
    keys = factor_keys(stem, raw.tensors)
    missing = [key for key in keys if key not in raw.tensors]
    if missing:
        raise AdapterFileError(str(raw.path), "is not a usable adapter", [(missing[0], "is missing")])
    a, b = (raw.tensors[key] for key in keys)
    if not a.elements or not b.shape:
        raise AdapterFileError(
            str(raw.path), "is not a usable adapter", [(stem, "has no factors in lora_A and lora_B")]
        )
    rank, alpha, note = a.shape[0], config.alpha_at(pattern_name(stem)), header.sites.get(stem)
    return SavedAdapter(
        path=stem if note is None else note["path"],
        r=rank if note is None else note["lora"].r,
        scaling=alpha / (sqrt(rank) if config.use_rslora else rank),
        shape=(b.shape[0], *a.shape[1:]),
        dtype=a.dtype,
        parameters=a.elements + b.elements,
        rule="" if note is None else note["rule"],
    )


def _modules(raw: RawFile) -> dict[str, int]:
    of_layers = (key for key in raw.tensors if split_factor_key(key) is not None or is_of_training(key))
    rest = {key: raw.tensors[key] for key in raw.tensors.keys() - of_layers}
    return {key.removeprefix(PREFIX): entry.elements for key, entry in sorted(rest.items())}


def _features(config: Configuration, header: Header) -> list[str]:
    sites = header.sites.values()
    features = {
        "rank-stabilised scaling": config.use_rslora,
        "DoRA": config.use_dora,
        "A as it started (LoRA-FA)": any(site["lora"].lora_fa for site in sites),
        "raw parameters": bool(config.target_parameters) or any(site.get("parameter") for site in sites),
        "slices": any(site.get("slices") for site in sites),
        "a factor that all experts share": any(site["lora"].share != "none" for site in sites),
        "an adapter for each call": any(site.get("calls") for site in sites),
        "modules trained whole": bool(config.modules_to_save),
        "a bias of lora_B": config.lora_bias,
        "blocks of a diagonal (BD-LoRA)": config.blocks is not None,
        "a diagonal between the factors (KaSA)": config.kasa,
        f"started at parts of the base ({config.init})": is_moved(config.init),
        "rows of an embedding": bool(config.token_rows),
        "biases of other layers": config.bias == "all",
        f"acts from tokens {listing(map(str, config.invocation))} on (aLoRA)": bool(config.invocation),
    }
    return [name for name, there in features.items() if there]
