"""A Plan as JSON and back."""

from __future__ import annotations

import json
from dataclasses import asdict

from lora_fx.planning.decide import Plan, PlannedRegion, PlannedSite, TrainedModule
from lora_fx.planning.sites import Site
from lora_fx.rules.ruleset import LoRAConfig, Slice, Slices

SCHEMA_VERSION = 1


def to_json(plan: Plan) -> str:
    """Return the plan as JSON text; equal plans give equal texts."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "model": plan.model,
        "source": plan.source,
        "fingerprint": plan.fingerprint,
        "total": plan.total,
        "trainable": plan.trainable,
        "sites": [_site(each) for each in plan.sites],
        "train": [asdict(module) for module in plan.train],
        "regions": [asdict(region) for region in plan.regions],
        "notes": plan.notes,
        "unmatched_rules": plan.unmatched_rules,
        "rules": plan.rules,
    }
    return json.dumps(document, indent=1)


def _site(each: PlannedSite) -> dict[str, object]:
    decided = {key: value for key, value in asdict(each).items() if key != "site"}
    return {**asdict(each.site), **decided}


def from_json(text: str) -> Plan:
    """Return the plan that `to_json` wrote; ValueError if the text is not one."""
    try:
        document = json.loads(text)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise ValueError(f"the plan has schema version {version}, this lora_fx reads {SCHEMA_VERSION}")
        return _plan(document)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a plan of lora_fx: not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a plan of lora_fx: {type(error).__name__}: {error}") from error


def _plan(document: dict[str, object]) -> Plan:
    fields = {key: value for key, value in document.items() if key not in ("schema_version", "trainable")}
    fields["sites"] = tuple(_planned_site(each) for each in _items(document["sites"]))
    fields["train"] = tuple(TrainedModule(**each) for each in _items(document["train"]))
    fields["regions"] = tuple(PlannedRegion(**each) for each in _items(document["regions"]))
    fields["notes"] = tuple(_items(document["notes"]))
    fields["unmatched_rules"] = tuple(_items(document["unmatched_rules"]))
    return Plan(**fields)  # type: ignore[arg-type]


def _items(value: object) -> list:  # type: ignore[type-arg]
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {value!r}")
    return value


def _planned_site(row: dict) -> PlannedSite:  # type: ignore[type-arg]
    decided = {key: row.pop(key) for key in ("decision", "reason", "rule", "lora", "slices", "per_call")}
    decided["passes"] = tuple(row.pop("passes", ()))
    lists = {key: tuple(row[key]) for key in ("classes", "shape", "aliases", "tied_to")}
    decided["lora"] = LoRAConfig(**decided["lora"]) if decided["lora"] else None
    decided["slices"] = _slices(decided["slices"]) if decided["slices"] else None
    return PlannedSite(Site(**{**row, **lists}), **decided)


def _slices(row: dict) -> Slices:  # type: ignore[type-arg]
    parts = (Slice(each["name"], each["size"], tuple(map(tuple, each["rows"]))) for each in row["parts"])
    return Slices(tuple(parts), tuple(row["adapt"]))
