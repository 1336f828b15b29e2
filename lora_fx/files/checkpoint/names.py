"""Names of an adapter against keys of a checkpoint, which often differ in a prefix (`model.` there or not)."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lora_fx.errors import MOST_SHOWN, AdapterMismatchError, MergeError
from lora_fx.files.checkpoint.basefiles import BaseCheckpoint
from lora_fx.text import nearest

_MOST_COMPARED, _MOST_NEAREST, _LONGEST = 2000, 20, 100
"""Pairs of names that are compared in all, names that are, and their length: comparing takes its square."""
_MOST_PREFIXES = 100


@dataclass(frozen=True, slots=True)
class Prefix:
    """What all names of the adapter lose and gain at their beginning to become keys of the checkpoint."""

    lost: str = ""
    gained: str = ""

    def key(self, name: str) -> str | None:
        """Return the key of a name, None where the name does not begin so."""
        return self.gained + name.removeprefix(self.lost) if name.startswith(self.lost) else None

    def text(self) -> str:
        return f"without '{self.lost}'" if self.lost else f"with '{self.gained}' before"


EXACT = Prefix()


def find_prefix(names: Sequence[str], base: BaseCheckpoint) -> Prefix:
    """Return the one prefix under which every name is a key; the names as they are come first.

    One for all of them: a lone name that fits elsewhere would be another module.

    Raises:
        AdapterMismatchError: under no prefix are all names found; lists all that are missing.
        MergeError: several prefixes fit.
    """
    if not names:
        return EXACT
    fitting = [prefix for prefix in _prefixes(names[0], base) if next(_missing(prefix, names, base), None) is None]
    if EXACT in fitting:
        return EXACT
    if len(fitting) > 1:
        facts = [(prefix.text(), f"{names[0]} is {prefix.key(names[0])}") for prefix in fitting]
        raise MergeError("the adapter's names fit the checkpoint in several ways", facts, "rename one of them")
    if not fitting:
        raise _unmatched(names, base)
    return fitting[0]


def _prefixes(name: str, base: BaseCheckpoint) -> Iterator[Prefix]:
    yield EXACT
    cuts = [match.end() for match in re.finditer(r"\.", name)][:-1]
    yield from (Prefix(lost=name[:cut]) for cut in cuts)
    prefixes = {key.removesuffix(name) for key in base.keys() if key.endswith(f".{name}")}  # noqa: SIM118
    yield from (Prefix(gained=prefix) for prefix in sorted(prefixes))


def _missing(prefix: Prefix, names: Iterable[str], base: BaseCheckpoint) -> Iterator[str]:
    return (name for name in names if (key := prefix.key(name)) is None or base.find(key) is None)


def _unmatched(names: Sequence[str], base: BaseCheckpoint) -> AdapterMismatchError:
    tried = {prefix for name in (names[0], names[len(names) // 2], names[-1]) for prefix in _prefixes(name, base)}
    first = sorted(tried, key=Prefix.text)[:_MOST_PREFIXES]
    missing = min(([*_missing(prefix, names, base)] for prefix in first), key=len)
    shown = missing[:MOST_SHOWN]
    compared = _MOST_COMPARED // min(len(shown), _MOST_NEAREST)
    facts = [
        (name, "adapted", _reason(name, base, compared if n < _MOST_NEAREST else 0)) for n, name in enumerate(shown)
    ]
    facts += [(name, "adapted", "has no such key") for name in missing[MOST_SHOWN:]]
    return AdapterMismatchError(
        "the adapter does not fit this checkpoint", facts, f"{len(missing)} of {len(names)} adapted weights are missing"
    )


def _reason(name: str, base: BaseCheckpoint, compared: int) -> str:
    """Return why a key is not there, as far as its neighbours show."""
    module = name.removesuffix(".weight")
    if compared and _of_experts(module, base):
        return "has one tensor per expert, which transformers fuses when it loads them; load the model and merge that"
    if base.find(f"{module}.weight_v") or base.find(f"{module}.parametrizations.weight.original0"):
        return "has a parametrized weight"
    if base.find(f"{module}.in_proj_weight"):
        return "has an attention's fused in_proj_weight; load the model and merge that"
    return no_such_key(name, base, compared)


def _of_experts(module: str, base: BaseCheckpoint) -> bool:
    match = re.search(r"(?:^|\.)experts(?:\.|$)", module)
    if match is None:
        return False
    start = module[: match.end()].rstrip(".") + ".0."
    return any(start in f".{key}" or key.startswith(start) for key in base.keys())  # noqa: SIM118


def no_such_key(name: str, base: BaseCheckpoint, compared: int = _MOST_COMPARED // _MOST_NEAREST) -> str:
    """Return that the name is missing, with keys that look like it; those of the same layer numbers are compared, and
    not too many.
    """
    numbers = re.findall(r"\d+", name)
    keys = base.keys() if compared and len(name) <= _LONGEST else ()
    like = (key for key in keys if len(key) <= _LONGEST and re.findall(r"\d+", key) == numbers)
    near = nearest(name, islice(like, compared))
    return f"has no such key; nearest: {', '.join(near)}" if near else "has no such key"
