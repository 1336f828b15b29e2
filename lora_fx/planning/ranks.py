"""Ranks spread over sites: each next one goes where it gains most, and rules that say so.  Pure data; no torch here."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_fx.planning.draft.covering import covering
from lora_fx.planning.planned import Inventory, PlannedSite
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet

RHO = 2.0
"""No site gets more than so many times the rank that it has where ranks are spread evenly."""


@dataclass(frozen=True, slots=True)
class Gains:
    """What one rank more gains at a site: never more than the one before it, for as many as it can have."""

    path: str
    values: tuple[float, ...]
    cost: int = 1
    """Of each."""


def spread(sites: Sequence[Gains], budget: int, least: int = 0) -> dict[str, int]:
    """Return the rank of each site: the next one goes where it gains most for its cost, until none fits the budget.

    Where gains are equal the first site has it.

    >>> spread([Gains("a", (5.0, 1.0)), Gains("b", (4.0, 3.0)), Gains("c", (2.0,), 3)], budget=4)
    {'a': 2, 'b': 2, 'c': 0}

    Args:
        sites: in model order.
        budget: the sum of costs that is not exceeded.
        least: what each site gets before any gets more, if it can have so many.
    """
    ranks = [min(least, len(site.values)) for site in sites]
    left = budget - sum(rank * site.cost for rank, site in zip(ranks, sites, strict=True))
    queue = [(-site.values[ranks[at]] / site.cost, at) for at, site in enumerate(sites) if ranks[at] < len(site.values)]
    heapq.heapify(queue)
    while queue:
        _, at = heapq.heappop(queue)
        site = sites[at]
        if site.cost > left:
            continue
        left -= site.cost
        ranks[at] += 1
        if ranks[at] < len(site.values):
            heapq.heappush(queue, (-site.values[ranks[at]] / site.cost, at))
    return {site.path: rank for site, rank in zip(sites, ranks, strict=True)}


def with_ranks(
    rules: RuleSet, sites: Sequence[PlannedSite], ranks: Mapping[str, int], inventory: Inventory, by: str, none: str
) -> RuleSet:
    """Return rules that give adapted sites these ranks at the scalings that they have, and change nothing else.

    Each rule gets rules for its ranks before it, by names.

    Args:
        rules: that adapt the sites.
        sites: what is adapted.
        ranks: of each, by its path.
        inventory: of the model: no other site bears the names.
        by: stands in the names of the rules: `linears: eva r=3`.
        none: the reason of those that get no rank, which are skipped.
    """
    groups: dict[tuple[str, int, int], list[str]] = {}
    for site in sites:
        before = 0 if site.lora is None else site.lora.r  # of a bank it may be a part of the rule's
        groups.setdefault((site.rule or "", ranks[site.path], before), []).append(site.path)
    document = rules.to_dict()
    written: list[dict[str, Any]] = []
    for rule in document["rules"]:
        own = sorted((key for key in groups if key[0] == rule["name"]), reverse=True)
        several = len({before for _, _, before in own}) > 1
        for key in own:
            _, rank, before = key
            title = " ".join(filter(None, (by, f"r={rank}", f"(before: {before})" if several else "")))
            written.append(_rule(rule, rank, before, _names(groups[key], inventory), title, none))
        written.append({**rule, "expect": "any"} if own else rule)
    return replace(read_rules({**document, "rules": written}), source=rules.source)


def _names(paths: Sequence[str], inventory: Inventory) -> tuple[str, ...]:
    wanted = set(paths)
    others = [path for site in inventory.sites if site.path not in wanted for path in site.paths]
    return covering(paths, others)


def _rule(rule: Mapping[str, Any], rank: int, before: int, names: Sequence[str], by: str, none: str) -> dict[str, Any]:
    """Return a rule that gives sites of one rule this rank in place of another, and the scaling that they had."""
    head = {"name": f"{rule['name']}: {by}", "match": {"name": [*names]}}
    if not rank:
        return {**head, "skip": none}
    lora = {key: value for key, value in rule["lora"].items() if key != "divide_r"}
    rest = {key: value for key, value in rule.items() if key not in ("name", "match", "lora", "expect")}
    # alpha / √r with `rslora`: as in PEFT, alpha grows with r there too
    return {**head, **rest, "lora": {**lora, "r": rank, "alpha": lora["alpha"] * rank / before}}
