"""What the weights of a model are for, as the shipped rules know them by their names."""

import functools
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_fx.planning.draft.covering import template
from lora_fx.planning.sites import CONVOLUTIONS, Site
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig, Rule

Role = Literal["attention", "MLP", "experts", "router", "linear", "parameter", "convolution", "head", "embedding"]
LINEAR: tuple[Role, ...] = ("attention", "MLP", "experts", "linear")
"""Roles of what is adapted where people say "all linear layers"."""
_ONE_EXPERT = re.compile(r"expert[^.]*\.[0-9]+\.", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Found:
    """A site, what it is for, and whether it lies in a block of which there may be many."""

    site: Site
    role: Role
    in_block: bool

    @property
    def narrow(self) -> int:
        """The smaller side of the matrix: a higher rank than this saves nothing."""
        return min(self.site.features)


@functools.cache
def _shipped(name: str) -> tuple[Rule, ...]:
    return read_rules(name).rules


def usual(name: str) -> LoRAConfig:
    """Return the adapter of a shipped rule file."""
    return next(rule.lora for rule in _shipped(name) if rule.lora is not None)


def is_adapted_by(name: str, site: Site) -> bool:
    """Whether a shipped rule file adapts a site."""
    first = next((rule for rule in _shipped(name) if site.fits(rule.match)), None)
    return first is not None and first.lora is not None


def _is_head(site: Site) -> bool:
    return any(rule.skip is not None and site.fits(rule.match) for rule in _shipped("all-linear"))


def found_in(sites: Sequence[Site]) -> tuple[Found, ...]:
    """Return each site with its role."""
    routers = _routers(sites)
    return tuple(Found(site, _role(site, routers), _is_in_block(site.path)) for site in sites)


def _role(site: Site, routers: Collection[str]) -> Role:
    if site.op == "embedding":
        return "embedding"
    if site.op in CONVOLUTIONS:
        return "convolution"
    if site.is_banked or site.op == "experts" or _ONE_EXPERT.search(site.path):
        return "experts"
    if _is_head(site):
        return "head"
    if site.path in routers:
        return "router"
    if site.op == "attention" or is_adapted_by("qkvo", site):
        return "attention"
    if is_adapted_by("mlp", site):
        return "MLP"
    return "parameter" if site.parameter and site.refusal else "linear"


def _is_in_block(path: str) -> bool:
    """Whether a number stands in a name, with something behind it: that of a block."""
    return "*" in template(path).split(".")[:-1]


def _routers(sites: Sequence[Site]) -> frozenset[str]:
    """Return the paths of the weights that choose experts: beside them, with an output for each."""
    banks = set(_banks(sites))
    return frozenset(
        site.path
        for site in sites
        if any((owner, site.features[0]) in banks for owner in (site.owner, site.owner.rpartition(".")[0]))
    )


def _banks(sites: Sequence[Site]) -> Iterator[tuple[str, int]]:
    """Yield (path of the module that holds experts, number of experts)."""
    lists: dict[str, set[str]] = {}
    for site in sites:
        if site.is_banked:
            yield from ((owner, site.bank) for owner in (site.owner, site.owner.rpartition(".")[0]))
        parts = site.path.split(".")
        for at, (name, number) in enumerate(itertools.pairwise(parts)):
            if "expert" in name.lower() and number.isdecimal():
                lists.setdefault(".".join(parts[:at]), set()).add(number)
    yield from ((owner, len(numbers)) for owner, numbers in lists.items())
