"""A plan from JSON: held to its types, and to what rules can say, before anything uses it.  No torch here."""

import functools
import math
from typing import Any, TypeVar

from lora_fx.errors import LoraFxError, RuleError
from lora_fx.planning.banks import is_decided
from lora_fx.planning.planned import PlannedSite
from lora_fx.rules.keys import MOST_DIMENSIONS, OPS
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig, Slices
from lora_fx.sources.document import parse_json
from lora_fx.sources.regular import UnreadableError
from lora_fx.sources.structure import MOST, structured
from lora_fx.text import shortened

SCHEMA_VERSION = 1
_DECIDED = ("decision", "reason", "rule", "lora", "slices", "per_call", "passes", "backend", "backend_reason")
_PASSES = {"fuse", "stack", "recompute", "loss"}
P = TypeVar("P")


class PlanFileError(LoraFxError, ValueError):
    """A text does not hold a plan that `Plan.to_json` has written."""


def read_plan(kind: type[P], text: str) -> P:
    """Return the plan that a JSON text holds.

    Args:
        kind: `Plan`.
        text: what `Plan.to_json` wrote.

    Raises:
        PlanFileError: it is none, of another schema version, or says what no plan can say.
    """
    try:
        return _plan(kind, parse_json(text))
    except UnreadableError as error:
        raise PlanFileError(f"not a plan that lora_fx has saved: {error}") from error


def _plan(kind: type[P], document: Any) -> P:
    if not isinstance(document, dict) or "schema_version" not in document:
        raise UnreadableError("it has no schema_version")
    if (version := document.pop("schema_version")) != SCHEMA_VERSION or type(version) is not int:
        raise UnreadableError(f"it is not of schema version {SCHEMA_VERSION}, which this lora_fx reads")
    trainable = document.pop("trainable", None)
    if isinstance(sites := document.get("sites"), list):
        document["sites"] = list(map(_nested, sites))
    document.pop("capture", None)
    plan: Any = structured(kind, document, "plan")
    for position, planned in enumerate(plan.sites):
        if problem := _problem(planned):
            raise UnreadableError(f"plan.sites[{position}] ({shortened(planned.path)}): {problem}")
    if len({planned.path for planned in plan.sites}) < len(plan.sites):
        raise UnreadableError("plan.sites: two have one path")
    if type(trainable) is not int or trainable != plan.trainable:
        raise UnreadableError(f"plan.trainable: its sites and modules have {plan.trainable:,} parameters to train")
    read: P = plan
    return read


def _nested(row: object) -> object:
    """Return a flat row of JSON as a planned site has it: with the site's own facts under `site`."""
    if not isinstance(row, dict):
        return row
    decided = {key: value for key, value in row.items() if key in _DECIDED}
    return {"site": {key: value for key, value in row.items() if key not in _DECIDED}, **decided}


def _problem(planned: PlannedSite) -> str:
    """Return what a plan cannot say of a site; "" if it can say all that."""
    site = planned.site
    if not site.classes or not 2 <= len(site.shape) <= MOST_DIMENSIONS or math.prod(site.shape) >= MOST:
        return "has no class, or no shape of a weight"
    if site.op not in OPS:
        return f"does {shortened(site.op)!r} with its weight, which no site does"
    if (planned.decision == "adapt") != (planned.lora is not None):
        return f"{planned.decision} {'without' if planned.lora is None else 'with'} an adapter"
    if planned.lora is None and (planned.slices is not None or planned.per_call):
        return "has slices or an adapter for each call, and no adapter"
    if planned.per_call and planned.calls is None:
        return "has an adapter for each of an unknown number of calls"
    if planned.lora is not None and not is_decided(site, planned.lora, planned.slices is not None):
        return "has what is not decided of a bank (divide_r, share), or of no bank"
    if not _PASSES.issuperset(planned.passes):
        return "has a pass that is unknown"
    return "" if planned.lora is None else _adapter_problem(planned.lora, planned.slices, site.features[0])


@functools.lru_cache(maxsize=256)
def _adapter_problem(lora: LoRAConfig, slices: Slices | None, out_features: int) -> str:
    """Return what rules could not say of an adapter, in the words of their reader; "" if they could."""
    rule: dict[str, Any] = {"match": {"name": "**"}, "lora": lora.to_dict()}
    try:
        if slices is not None:
            rule["slices"] = slices.to_dict()
            if read_rules({"version": 1, "rules": [rule]}).rules[0].slices != slices:
                return "slices: a part stands there twice, or has a size and ranges"
            slices.ranges(out_features)
        else:
            read_rules({"version": 1, "rules": [rule]})
    except RuleError as error:
        return error.problems[0].message
    except ValueError as error:
        return str(error)
    return ""
