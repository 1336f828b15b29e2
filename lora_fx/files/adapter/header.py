"""What lora_fx writes beside the tensors of a safetensors file, with a hash over both: a flipped bit is seen."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lora_fx.errors import AdapterFileError, RuleError
from lora_fx.files.adapter.configuration import is_number, is_share, is_whole
from lora_fx.files.adapter.names import METADATA_KEY
from lora_fx.files.adapter.site import NOTED
from lora_fx.planning.sites import Layout
from lora_fx.rules.keys import OPS, is_adapter_name
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig, Slices

FORMAT_VERSION = 1
_HASH = "sha256"


@dataclass(frozen=True, slots=True)
class Header:
    """What is known of an adapter beyond PEFT's configuration."""

    adapter: str
    others: tuple[str, ...] = ()
    """Names of the adapters that were saved with it, in directories of their names."""
    trained: tuple[str, ...] = ()
    """Paths of the modules that are trained whole."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields of the SavedSite by what stands for the site in the keys of the file."""
    rules: dict[str, Any] = field(default_factory=dict)
    base: dict[str, list[float] | None] = field(default_factory=dict)
    """A few values of each base weight."""


def header_text(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the header as it is written: with the format's version and the hash over content and tensors."""
    numbered = {"format": FORMAT_VERSION, **content}
    return _canonical(numbered | {_HASH: hash_of(numbered, tensors)})


def _canonical(content: Mapping[str, Any]) -> str:
    # keys keep their order: the parts of a fused weight lie in the order in which `slices` names them
    return json.dumps(content, separators=(",", ":"))


def hash_of(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a header's content and over names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256(_canonical(content).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_header(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Header | None:
    """Return the header of a file, None for a file of PEFT's.

    Raises:
        AdapterFileError: it is damaged, of another format, or not what was written with these tensors.
    """
    if METADATA_KEY not in metadata:
        _refuse_misspelt_key(path, metadata)
        return None
    try:
        content = json.loads(metadata[METADATA_KEY])
        version, noted = content["format"], content.pop(_HASH)
        if version == FORMAT_VERSION:
            _check_hash(path, noted, hash_of(content, tensors))
            return _header(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterFileError(str(path), "has a damaged header", [(METADATA_KEY, str(error))]) from error
    facts = [("written as format", str(version)), ("this lora_fx reads", str(FORMAT_VERSION))]
    raise AdapterFileError(str(path), "is of another format", facts, "use the lora_fx that wrote it, or a newer one")


def _refuse_misspelt_key(path: Path, metadata: Mapping[str, str]) -> None:
    """A flipped bit in the key itself would let the file pass as PEFT's."""
    for key in metadata:
        if len(key) == len(METADATA_KEY) and sum(a != b for a, b in zip(key, METADATA_KEY, strict=True)) == 1:
            raise AdapterFileError(str(path), "has a damaged header", [(METADATA_KEY, f"is spelt {key!r}")])


def _check_hash(path: Path, noted: str, actual: str) -> None:
    if actual != noted:
        facts = [("SHA-256 when written", noted), ("SHA-256 now", actual)]
        advice = "copy it again from where it was written"
        raise AdapterFileError(
            str(path), "is damaged: its contents have changed since they were written", facts, advice
        )


def _header(content: Mapping[str, Any]) -> Header:
    names = (content["adapter"], *content["others"])
    if not all(map(is_adapter_name, names)):  # they become directories and names of modules
        raise ValueError(f"{names} are not names of adapters")
    sites = {stem: _noted(stem, saved) for stem, saved in content["sites"].items()}
    places = Counter((site["path"], site.get("call")) for site in sites.values())
    if max(places.values(), default=1) > 1:
        raise ValueError(f"{places.most_common(1)[0][0][0]} is noted twice")
    return Header(
        adapter=content["adapter"],
        others=tuple(content["others"]),
        trained=tuple(content["trained"]),
        sites=sites,
        rules=content["rules"],
        base=content["base"],
    )


def _noted(stem: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is noted of a site as fields of a SavedSite."""
    wrong = [name for name, fits in _FITS.items() if name in saved and not fits(saved[name])]
    if wrong:
        raise ValueError("; ".join(f"{stem}: {name} is {saved[name]!r:.60}" for name in wrong))
    lora = LoRAConfig(**{attribute.name: saved[attribute.name] for attribute in fields(LoRAConfig)})
    known = {"path": saved.get("path", stem), "lora": lora, "rule": saved["rule"], "op": saved["op"]}
    known |= {name: saved[name] for name in NOTED if name in saved}
    parameter, call, calls = known.get("parameter", ""), known.get("call"), known.get("calls", 0)
    if parameter not in ("", known["path"]) or (call is None) != (calls == 0):
        raise ValueError(f"{stem}: parameter is {parameter!r}, call {call} of {calls}")
    if call is not None and call >= calls:
        raise ValueError(f"{stem}: call {call} of {calls}")
    return known


def slices_of(written: Mapping[str, Any]) -> Slices:
    """Return the slices that a note holds as a rule file would; ValueError if they are not slices."""
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "slices": dict(written)}]}
    try:
        slices = read_rules(rules).rules[0].slices
    except RuleError as error:
        raise ValueError(str(error)) from error
    assert slices is not None
    return slices


def _are_slices(value: object) -> bool:
    return value is None or (isinstance(value, dict) and slices_of(value) is not None)


_FITS: dict[str, Callable[[Any], bool]] = {
    "r": is_whole,
    "alpha": is_number,
    "dropout": is_share,
    "adapter": is_adapter_name,
    "call": lambda value: value is None or is_whole(value, least=0),
    "calls": lambda value: is_whole(value, least=0),
    "file_ranks": is_whole,
    "op": lambda value: value in (*OPS, "other"),
    "layout": lambda value: value in get_args(Layout),
    "slices": _are_slices,
    **{name: lambda value: isinstance(value, bool) for name in ("rslora", "dora", "bias", "read", "share_dropout")},
    **{name: lambda value: isinstance(value, str) for name in ("init", "path", "rule", "parameter")},
}
"""What each value of a note can be: a header may have been written by anybody."""
