"""Rules as data: which sites get which adapter."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from lora_fx.errors import SourceSpan
from lora_fx.rules.keys import BY_EXPERTS, LORA_DEFAULTS
from lora_fx.rules.patterns import NamePattern, ShapePattern
from lora_fx.rules.writing import rule_file
from lora_fx.text import listing, shortened


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """What one adapter is: ΔW = scaling · B A with B [out, r] and A [r, in]."""

    r: int = LORA_DEFAULTS["r"]
    alpha: float = LORA_DEFAULTS["alpha"]
    dropout: float = LORA_DEFAULTS["dropout"]
    init: str = LORA_DEFAULTS["init"]
    rslora: bool = False
    dora: bool = False
    bias: bool = False
    """Also train the site's own bias."""
    adapter: str = LORA_DEFAULTS["adapter"]
    share_dropout: bool = False
    """Let the dropout of sites on one input drop the same entries."""
    lora_fa: bool = False
    """Leave A as it starts, and train B alone (arXiv:2308.03303)."""
    share: str = "none"
    """Which factor all matrices of a bank have together; what is planned is never "outer"."""
    divide_r: int = 1
    """By what r is divided at a bank, 0 for the number of its matrices; what is planned is divided already."""
    invocation: tuple[int, ...] = ()
    """Ids of the tokens from whose last occurrence on it acts; none: on every token."""

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # it never changes

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a rule file would hold, without invocations and what is of banks, as by default."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "invocation"}
        told = {name: value for name, value in values.items() if OF_BANKS.get(name, _MISSING) != value}
        told |= {"divide_r": BY_EXPERTS} if self.divide_r == 0 else {}
        return told | ({"invocation": list(self.invocation)} if self.invocation else {})

    @property
    def scaling(self) -> float:
        """alpha / r (Hu et al. 2021, arXiv:2106.09685, §4.1); with `rslora` alpha / √r (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


OF_BANKS: dict[str, object] = {"share": "none", "divide_r": 1}
"""What counts at banks alone, with its defaults, which are not written: files of other sites stay as they were."""
_MISSING = object()


@dataclass(frozen=True, slots=True)
class Match:
    """Which sites a rule means; an empty field sets no condition, all others must hold."""

    name: tuple[NamePattern, ...] = ()
    shape: ShapePattern | None = None
    op: tuple[str, ...] = ()
    cls: tuple[NamePattern, ...] = ()

    def fits(self, paths: Sequence[str], shape: Sequence[int], op: str, classes: Sequence[str]) -> bool:
        """Whether a site matches; of its paths any may match, of its classes too."""
        return (
            (not self.op or op in self.op)
            and (not self.name or any(pattern.matches(path) for pattern in self.name for path in paths))
            and (not self.cls or any(pattern.matches(name) for pattern in self.cls for name in classes))
            and (self.shape is None or self.shape.explain(shape) is None)
        )

    def explain(self, paths: Sequence[str], shape: Sequence[int], op: str, classes: Sequence[str]) -> str | None:
        """Return why a site does not match, or None if it does."""
        if self.fits(paths, shape, op, classes):
            return None
        if self.name and not any(pattern.matches(path) for pattern in self.name for path in paths):
            return f"name {paths[0]} does not match {_listed(self.name)}"
        if self.op and op not in self.op:
            return f"op {op} is not {' or '.join(self.op)}"
        if self.cls and not any(pattern.matches(name) for pattern in self.cls for name in classes):
            return f"class {classes[0]} does not match {_listed(self.cls)}"
        problem = None if self.shape is None else self.shape.explain(shape)
        return None if problem is None else f"shape: {problem}"

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a rule file would hold."""
        values = {
            "name": [pattern.text for pattern in self.name],
            "shape": None if self.shape is None else self.shape.values(),
            "op": list(self.op),
            "class": [pattern.text for pattern in self.cls],
        }
        return {key: value for key, value in values.items() if value}

    def __str__(self) -> str:
        if self.name and not (self.shape or self.op or self.cls):
            return _listed(self.name)
        parts = {"name": _listed(self.name), "shape": str(self.shape or ""), "op": ", ".join(self.op)}
        parts["class"] = _listed(self.cls)
        return " ".join(f"{key}={text}" for key, text in parts.items() if text)


def _listed(patterns: Sequence[NamePattern]) -> str:
    return listing((shortened(pattern.text, 300) for pattern in patterns), 60)


Ranges = tuple[tuple[int, int], ...]
"""Of rows: the first and the end, which is not included."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One part of a fused weight: an equal share (no size), a number of rows, or ranges of rows (half open)."""

    name: str
    size: int | None = None
    rows: Ranges = ()


@dataclass(frozen=True, slots=True)
class Slices:
    """The parts of a fused weight, and which of them get an adapter."""

    parts: tuple[Slice, ...]
    adapt: tuple[str, ...]

    def rows(self, out_features: int) -> tuple[tuple[int, ...], ...]:
        """Return the rows of each part that is adapted, in the order of the parts.

        Raises:
            ValueError: the parts do not fit a weight of so many rows; says how.
        """
        return tuple(tuple(row for run in part for row in range(*run)) for part in self.ranges(out_features))

    def ranges(self, out_features: int) -> tuple[Ranges, ...]:
        """Return the ranges of rows (half open) of each part that is adapted, in the order of the parts.

        Raises:
            ValueError: as `rows`.
        """
        ranges, adapt = self._all_ranges(out_features), set(self.adapt)
        return tuple(ranges[part.name] for part in self.parts if part.name in adapt)

    def _all_ranges(self, out_features: int) -> dict[str, Ranges]:
        if end := max((b for part in self.parts for _, b in part.rows), default=0):
            if end > out_features:
                raise ValueError(f"the slices name rows up to {end}, the weight has {out_features}")
            return {part.name: part.rows for part in self.parts}
        equal, rest = divmod(out_features, len(self.parts))
        sizes = [equal if part.size is None else part.size for part in self.parts]
        if self.parts[0].size is None and (rest or not equal):
            raise ValueError(f"{out_features} rows cannot be cut into {len(self.parts)} equal parts")
        if sum(sizes) != out_features:
            raise ValueError(f"the slices have {sum(sizes)} rows together, the weight has {out_features}")
        shares = zip(self.parts, sizes, itertools.accumulate(sizes), strict=True)
        return {part.name: ((end - size, end),) for part, size, end in shares}

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a rule file would hold."""
        of: Any = {part.name: part.size or [f"{a}..{b}" for a, b in part.rows] for part in self.parts}
        return {"of": of if any(of.values()) else list(of), "adapt": list(self.adapt)}


def are_neighbours(ranges: Ranges) -> bool:
    """Whether each range of rows begins where the one before it ends."""
    return all(end == first for (_, end), (first, _) in itertools.pairwise(ranges))


def as_runs(parts: Sequence[tuple[int, ...]]) -> tuple[tuple[int, int], ...] | None:
    """Return the first row and the end of each part; None where the rows of a part are not neighbours."""
    runs = tuple((part[0], part[-1] + 1) for part in parts)
    return runs if all(part == tuple(range(*run)) for part, run in zip(parts, runs, strict=True)) else None


@dataclass(frozen=True, slots=True)
class Expect:
    """How many sites a rule must decide."""

    minimum: int = 1
    maximum: int | None = None

    def accepts(self, number: int) -> bool:
        return self.minimum <= number and (self.maximum is None or number <= self.maximum)

    def value(self) -> int | str | None:
        """Return what a rule file would hold; None for the default."""
        if self.maximum is not None:
            return self.maximum
        return "any" if self.minimum == 0 else None

    def __str__(self) -> str:
        if self.maximum is not None:
            return f"exactly {self.maximum}"
        return "at least one" if self.minimum else "any number"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it matches, and what happens there (`lora`, or `skip` with a reason)."""

    name: str
    match: Match
    lora: LoRAConfig | None
    skip: str | None
    slices: Slices | None
    expect: Expect
    span: SourceSpan
    match_span: SourceSpan
    """Where its match is written."""
    per_call: bool = False
    """Whether each call of a module that is called several times gets an adapter of its own."""

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a rule file would hold."""
        values = {
            "name": self.name,
            "match": self.match.to_dict(),
            "lora": None if self.lora is None else self.lora.to_dict(),
            "skip": self.skip,
            "slices": None if self.slices is None else self.slices.to_dict(),
            "per_call": self.per_call or None,
            "expect": self.expect.value(),
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TrainPattern:
    """Modules that are trained whole and saved with the adapter."""

    pattern: NamePattern
    span: SourceSpan


@dataclass(frozen=True, slots=True)
class TokenRule:
    """Rows of embeddings that are trained alone and saved with an adapter."""

    name: tuple[NamePattern, ...]
    ids: tuple[int, ...]
    """In ascending order, each once."""
    adapter: str
    """Whose they are; empty stands for the only adapter of the rules."""
    span: SourceSpan

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a rule file would hold."""
        adapter = {"adapter": self.adapter} if self.adapter else {}
        return {"name": [pattern.text for pattern in self.name], "ids": list(self.ids), **adapter}


@dataclass(frozen=True, slots=True)
class RuleSet:
    """All rules of a file, in their order: the first that matches a site decides it."""

    rules: tuple[Rule, ...]
    train: tuple[TrainPattern, ...]
    source: str
    tokens: tuple[TokenRule, ...] = ()
    all_biases: bool = False
    """Whether every bias of the model is trained: of adapted sites by their own `bias`, and all others."""

    def to_dict(self) -> dict[str, Any]:
        """Return a dict that `read_rules` reads as the same rules."""
        train = {"train": [trained.pattern.text for trained in self.train]} if self.train else {}
        tokens = {"tokens": [rule.to_dict() for rule in self.tokens]} if self.tokens else {}
        biases = {"bias": "all"} if self.all_biases else {}
        return {"version": 1, "rules": [rule.to_dict() for rule in self.rules], **train, **tokens, **biases}

    def to_yaml(self) -> str:
        """Return the text of a rule file that is read as the same rules; what is as by default is left out."""
        return rule_file(self.short_dict())

    def short_dict(self) -> dict[str, Any]:
        """Return `to_dict` without the keys of adapters that are as by default, but for rank and alpha."""
        document, usual = self.to_dict(), LoRAConfig().to_dict()
        for rule in document["rules"]:
            if "lora" in rule:
                lora = rule["lora"]
                rule["lora"] = {key: lora[key] for key in lora if key in ("r", "alpha") or lora[key] != usual.get(key)}
        return document
