"""EVA's ranks: as many in all as the rules say, to the sites whose directions explain most of their inputs' variance.

Source: Paischer et al. 2024, arXiv:2410.07170, §3.3; as in PEFT 0.21, alpha follows r, so that the scaling stays.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lora_fx.adapters.factors.fromdata import Covariance, Directions
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import PlannedSite
from lora_fx.rules.patterns import glob_of
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet

RHO = 2.0
"""No site gets more than so many times the rank that its rule says."""


def redistributed(rules: RuleSet, decisions: Decisions, met: Mapping[str, Directions | Covariance]) -> RuleSet | None:
    """Return rules that give the sites of EVA the ranks that the data asks for; None if that changes nothing."""
    sites = [site for site in decisions.adapted if isinstance(met.get(site.path), Directions)]
    ranks = _ranks(sites, met) if sites else {}
    if all(site.lora is None or ranks[site.path] == site.lora.r for site in sites):
        return None
    document = rules.to_dict()
    groups: dict[tuple[str, int], list[PlannedSite]] = {}
    for site in sites:
        groups.setdefault((site.rule or "", ranks[site.path]), []).append(site)
    written: list[dict[str, Any]] = []
    for rule in document["rules"]:
        own = sorted((key for key in groups if key[0] == rule["name"]), key=lambda key: -key[1])
        written += [_rule(rule, rank, groups[rule["name"], rank]) for _, rank in own]
        written.append({**rule, "expect": "any"} if own else rule)
    return replace(read_rules({**document, "rules": written}), source=rules.source)


def _ranks(sites: list[PlannedSite], met: Mapping[str, Directions | Covariance]) -> dict[str, int]:
    """Return how many of the directions that explain most are each site's; the first in model order where they tie."""
    budget = sum(site.lora.r for site in sites if site.lora is not None)
    shares = {path: directions.shares() for path, directions in met.items() if isinstance(directions, Directions)}
    owners = [site.path for site in sites for _ in shares[site.path]]
    order = torch.cat([shares[site.path].cpu() for site in sites]).argsort(descending=True, stable=True)
    counted = Counter(owners[number] for number in order[:budget].tolist())
    return {site.path: counted[site.path] for site in sites}


def _rule(rule: Mapping[str, Any], rank: int, sites: list[PlannedSite]) -> dict[str, Any]:
    """Return a rule that gives sites of one rule this rank, and the scaling that they had."""
    head = {"name": f"{rule['name']}: eva r={rank}", "match": {"name": [glob_of(site.path) for site in sites]}}
    if not rank:
        return {**head, "skip": "EVA gives it no rank: others explain more of their inputs"}
    lora = rule["lora"]
    # alpha / √r with `rslora`: as in PEFT, alpha grows with r there too
    return {**head, "lora": {**lora, "r": rank, "alpha": lora["alpha"] * rank / lora["r"]}}
