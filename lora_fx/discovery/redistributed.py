"""EVA's ranks: as many in all as the rules say, to the sites whose directions explain most of their inputs' variance.

Source: Paischer et al. 2024, arXiv:2410.07170, §3.3; as in PEFT 0.21, alpha follows r, so that the scaling stays.
"""

from collections.abc import Mapping

from lora_fx.adapters.factors.fromdata import Covariance, Directions
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import Inventory
from lora_fx.planning.ranks import Gains, spread, with_ranks
from lora_fx.rules.ruleset import RuleSet

_NONE = "EVA gives it no rank: others explain more of their inputs"


def redistributed(
    rules: RuleSet, decisions: Decisions, met: Mapping[str, Directions | Covariance], inventory: Inventory
) -> RuleSet | None:
    """Return rules that give the sites of EVA the ranks that the data asks for; None if that changes nothing."""
    sites = [site for site in decisions.adapted if isinstance(met.get(site.path), Directions)]
    before = {site.path: site.lora.r for site in sites if site.lora is not None}
    shares = {path: directions.shares() for path, directions in met.items() if isinstance(directions, Directions)}
    ranks = spread([Gains(path, tuple(shares[path].tolist())) for path in before], sum(before.values()))
    return None if ranks == before else with_ranks(rules, sites, ranks, inventory, "eva", _NONE)
