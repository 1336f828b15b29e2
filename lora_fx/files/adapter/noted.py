"""What lora_fx notes of an adapter beside its tensors, checked: it may have been written by anybody.  No torch here."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from lora_fx.errors import AdapterFileError, RuleError
from lora_fx.files.adapter.names import METADATA_KEY
from lora_fx.files.adapter.settings import is_number, is_share, is_whole
from lora_fx.planning.sites import Layout
from lora_fx.rules.inits import is_noted
from lora_fx.rules.keys import OPS, is_adapter_name
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import OF_BANKS, LoRAConfig, Slices
from lora_fx.sources.document import parse_json

FORMAT_VERSION = 1
HASH = "sha256"
SAMPLES = 8
"""How many values of each base weight are noted."""
NOTED = ("parameter", "layout", "read", "slices", "call", "calls", "file_ranks")
"""What is noted of a site where it is not as for a plain linear; the hash of a header depends on the order."""


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
    tied: dict[str, str] = field(default_factory=dict)
    """Names of weights that have the trained rows of another one, by their own name."""


def noted_in(path: Path, metadata: Mapping[str, str]) -> tuple[Header, dict[str, Any]] | None:
    """Return what is noted in a file, checked, and as it stands there; None for a file of PEFT's.

    Raises:
        AdapterFileError: it is damaged, of another format, or says what cannot be.
    """
    if METADATA_KEY not in metadata:
        _refuse_misspelt_key(path, metadata)
        return None
    try:
        content = parse_json(metadata[METADATA_KEY])
        version = content["format"]
        if version == FORMAT_VERSION:
            return _header(content), content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise AdapterFileError(str(path), "has a damaged header", [(METADATA_KEY, f"{reason:.300}")]) from error
    facts = [("written as format", f"{version!s:.60}"), ("this lora_fx reads", str(FORMAT_VERSION))]
    raise AdapterFileError(str(path), "is of another format", facts, "use the lora_fx that wrote it, or a newer one")


def _refuse_misspelt_key(path: Path, metadata: Mapping[str, str]) -> None:
    """A flipped bit in the key itself would let the file pass as PEFT's."""
    for key in metadata:
        if len(key) == len(METADATA_KEY) and sum(a != b for a, b in zip(key, METADATA_KEY, strict=True)) == 1:
            raise AdapterFileError(str(path), "has a damaged header", [(METADATA_KEY, f"is spelt {key!r}")])


def _header(content: Mapping[str, Any]) -> Header:
    for name, (fits, words) in _CONTENT.items():
        if not fits(content[name]):
            raise ValueError(f"{name} is {content[name]!r:.60}, not {words}")
    names = (content["adapter"], *content["others"])  # they become directories and names of modules
    if len({*names}) < len(names):
        raise ValueError(f"{names!s:.60} are not names of adapters")
    tied = content.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise ValueError(f"tied is {tied!r:.60}, not a table of names")
    alike = _Alike()
    sites = {stem: _noted(stem, saved, alike) for stem, saved in content["sites"].items()}
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
        tied=tied,
    )


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME and is_adapter_name(value)


def _are_values(value: object) -> bool:
    if value is None:
        return True
    are_floats = isinstance(value, list) and len(value) == SAMPLES and {*map(type, value)} == {float}
    return are_floats or (isinstance(value, list) and len(value) == SAMPLES and all(map(_is_value, value)))


def _is_value(value: object) -> bool:
    return isinstance(value, float) or is_number(value)  # a base weight may hold infinities


_LONGEST_NAME = 100
_CONTENT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (_is_name, "the name of an adapter"),
    "others": (lambda value: isinstance(value, list) and all(map(_is_name, value)), "a list of names of adapters"),
    "trained": (lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of paths"),
    "rules": (lambda value: isinstance(value, dict), "a table"),
    "sites": (lambda v: isinstance(v, dict) and all(isinstance(note, dict) for note in v.values()), "a table of notes"),
    "base": (lambda v: isinstance(v, dict) and all(map(_are_values, v.values())), f"{SAMPLES} numbers for each weight"),
}


@dataclass(frozen=True, slots=True)
class _Alike:
    """What of the notes of earlier sites has been looked at: most sites say the same."""

    fitting: set[tuple[str, type, object]] = field(default_factory=set)
    loras: dict[tuple[object, ...], LoRAConfig] = field(default_factory=dict)


def _noted(stem: str, saved: Mapping[str, Any], alike: _Alike) -> dict[str, Any]:
    """Return what is noted of a site as fields of a SavedSite."""
    asked = [
        (name, saved[name])
        for name in _FITS
        if name in saved
        and not (type(saved[name]) in _SCALARS and (name, type(saved[name]), saved[name]) in alike.fitting)
        and not (type(saved[name]) is str and name in _TEXTS)
    ]
    if wrong := [name for name, value in asked if not _FITS[name](value)]:
        raise ValueError("; ".join(f"{stem}: {name} is {saved[name]!r:.60}" for name in wrong))
    if asked:
        alike.fitting.update([(name, type(value), value) for name, value in asked if type(value) in _SCALARS])
    noted: dict[str, Any] = {"lora_fa": False, **OF_BANKS, **saved}  # files of before there were these keys have none
    given = {name: noted[name] for name in _GIVEN}
    invocation = tuple(saved.get(_INVOCATION, ()))
    kind = (invocation, *given.values(), *map(type, given.values()))
    lora = alike.loras.get(kind) or alike.loras.setdefault(kind, LoRAConfig(**given, invocation=invocation))
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


_INVOCATION = "invocation"
_TEXTS = ("path", "rule", "parameter")
_SCALARS = (bool, int, float, str)
_GIVEN = tuple(part.name for part in fields(LoRAConfig) if part.name != _INVOCATION)
_FITS: dict[str, Callable[[Any], bool]] = {
    _INVOCATION: lambda value: isinstance(value, list) and all(is_whole(token, 0) for token in value),
    "r": is_whole,
    "alpha": is_number,
    "dropout": is_share,
    "adapter": _is_name,
    "call": lambda value: value is None or is_whole(value, least=0),
    "calls": lambda value: is_whole(value, least=0),
    "file_ranks": is_whole,
    "op": lambda value: value in (*OPS, "other"),
    "init": is_noted,
    "layout": lambda value: value in get_args(Layout),
    "slices": _are_slices,
    "share": lambda value: value in ("none", "A", "B"),
    "divide_r": lambda value: type(value) is int and value == OF_BANKS["divide_r"],
    **dict.fromkeys(
        ("rslora", "dora", "bias", "read", "share_dropout", "lora_fa"), lambda value: isinstance(value, bool)
    ),
    **{name: lambda value: isinstance(value, str) for name in _TEXTS},
}
"""What each value of a note can be: a header may have been written by anybody."""
