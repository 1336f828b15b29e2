"""What rules of a draft would cost, by the plan that they lead to."""

from collections.abc import Callable, Mapping, Sequence

from lora_fx.planning.decide import decide
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.planned import Inventory, PlannedSite
from lora_fx.rules.reader import read_rules
from lora_fx.rules.writing import Written
from lora_fx.text import scaled, share_of_parameters

Stored = Callable[[PlannedSite], int]
"""Tells how many numbers the factors of a site have in an adapter's file."""
_BYTES = 4


def decided(rules: Sequence[Mapping[str, Written]], inventory: Inventory) -> Decisions:
    """Return what rules decide; each must match something."""
    return decide(read_rules({"rules": list(rules)}), inventory)


def cost(decisions: Decisions, stored: Stored, same_rows: bool) -> str:
    """Return `884,736 of 124,439,808 parameters (0.71 %), 3.54 MB in float32, +1.6 % FLOPs in these layers`.

    Args:
        decisions: of the rules.
        stored: how many numbers a file has of each site.
        same_rows: whether all sites meet the same rows, so that their FLOPs can be added.
    """
    size = _BYTES * sum(map(stored, decisions.adapted))
    parts = [share_of_parameters(decisions.trainable, decisions.total), f"{scaled(size, 'B')} in float32"]
    return ", ".join(filter(None, (*parts, _more_flops(decisions.adapted, stored) if same_rows else "")))


def _more_flops(adapted: Sequence[PlannedSite], stored: Stored) -> str:
    """Return how much longer a forward of the adapted layers is: r (in + out) products to in · out in each row.

    The zeros that are stored between parts of a fused weight are multiplied too.
    """
    calls = [one.calls or 1 for one in adapted]
    more = sum(number * stored(one) for number, one in zip(calls, adapted, strict=True))
    base = sum(number * one.shape[0] * one.shape[1] for number, one in zip(calls, adapted, strict=True))
    share = 100 * more / base if base else 0.0
    return f"+{share:.{1 if share < 10 else 0}f} % FLOPs in these layers" if base else ""
