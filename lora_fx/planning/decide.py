"""Rules and an inventory in, a Plan out: what will happen to every site, and why.  Pure data; nothing is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lora_fx.errors import NoMatchError, Unmatched
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory, PlannedSite, TrainedModule, dead_notes, rank_notes
from lora_fx.planning.sites import CONVOLUTIONS, Site, differences, fingerprint
from lora_fx.rules.patterns import nearest_names
from lora_fx.rules.ruleset import Rule, RuleSet, TrainPattern
from lora_fx.text import count


def decide(rules: RuleSet, inventory: Inventory, strict: bool = True) -> Plan:
    """Return the plan: the first matching rule decides a site.

    Raises:
        NoMatchError: naming every rule that fails, if `strict`.
    """
    trained, failed = _trained(rules.train, inventory)
    planned = tuple(on_backend(_decide_site(site, rules.rules, trained), inventory) for site in inventory.sites)
    failed += _failed_expectations(rules.rules, planned, inventory)
    if failed and strict:
        raise NoMatchError(failed, len(inventory.sites))
    decided = {site.rule for site in planned}
    return Plan(
        model=inventory.model,
        source=rules.source,
        sites=planned,
        train=trained,
        total=inventory.total,
        fingerprint=fingerprint(inventory.sites),
        notes=(*_shadow_notes(rules.rules, planned), *rank_notes(planned), *dead_notes(planned)),
        unmatched_rules=tuple(rule.name for rule in rules.rules if rule.name not in decided),
        rules=rules.to_dict(),
    )


def _matches(rule: Rule, site: Site) -> bool:
    return rule.match.matches(site.paths, site.shape, site.op, site.classes)


def _decide_site(site: Site, rules: Sequence[Rule], trained: Sequence[TrainedModule]) -> PlannedSite:
    owner = _trained_owner(site, trained)
    if owner is not None:
        return PlannedSite(site, "keep", f"trained whole (train: {owner.pattern})")
    rule = next((rule for rule in rules if _matches(rule, site)), None)
    if rule is None:
        return PlannedSite(site, "keep", "no rule")
    if rule.skip is not None:
        return PlannedSite(site, "skip", rule.skip, rule.name)
    refusal = site.refusal or _unsupported(rule, site)
    if refusal is not None:
        return PlannedSite(site, "refuse", refusal, rule.name)
    per_call = rule.per_call and site.calls != 1
    return PlannedSite(site, "adapt", _origin(rule), rule.name, rule.lora, rule.slices, per_call)


def on_backend(planned: PlannedSite, inventory: Inventory) -> PlannedSite:
    """Return what is decided of a site with its backend, where a graph of the model's own tells which."""
    if inventory.in_graph is None:
        return planned
    if planned.path in inventory.in_graph:
        return replace(planned, backend="graph")
    return replace(planned, backend_reason="inside a module that the graph calls as a whole")


def _unsupported(rule: Rule, site: Site) -> str | None:
    """Return why a site cannot have the adapter that its rule wants; None if it can."""
    assert rule.lora is not None
    if rule.slices is not None:
        if site.op in (*CONVOLUTIONS, "embedding"):
            return f"slices are for weights with parts among their rows, not for {site.op}"
        try:
            rule.slices.rows(site.features[0])
        except ValueError as problem:
            return str(problem)
    if rule.lora.dora and (site.op != "linear" or site.parameter or rule.slices is not None or rule.per_call):
        return "DoRA is for whole linear layers, not for this kind of site; leave out `dora`"
    if rule.per_call and site.calls is None:
        return "per_call needs example_inputs: without them nothing shows how often it is called"
    if rule.per_call and site.calls != 1 and (site.read or site.parameter):
        return "per_call is for layers that are called; code reads this weight, which does not show which call it is"
    return None


def _origin(rule: Rule) -> str:
    return f"{rule.name} (line {rule.span.line})" if rule.span.line else rule.name


def _trained_owner(site: Site, trained: Sequence[TrainedModule]) -> TrainedModule | None:
    for module in trained:
        if any(path == module.path or path.startswith(f"{module.path}.") for path in site.paths):
            return module
    return None


def _trained(
    patterns: Sequence[TrainPattern], inventory: Inventory
) -> tuple[tuple[TrainedModule, ...], list[Unmatched]]:
    """Return the modules under `train:`, and the patterns that match none."""
    found: dict[str, TrainedModule] = {}
    failed = []
    for each in patterns:
        matched = [(path, size) for path, size in inventory.modules if path and each.pattern.matches(path)]
        if not matched:
            failed.append(_unmatched_train(each, inventory))
        for path, size in matched:
            found.setdefault(path, TrainedModule(path, size, each.pattern.text))
    return _outermost(found), failed


def _unmatched_train(each: TrainPattern, inventory: Inventory) -> Unmatched:
    near = nearest_names(each.pattern, [path for path, _ in inventory.modules if path])
    return Unmatched("train", each.pattern.text, "at least one", 0, near, "", "modules", each.span)


def _outermost(found: dict[str, TrainedModule]) -> tuple[TrainedModule, ...]:
    """Return the modules that lie in no other of them, so that no parameter is counted twice."""

    def inside(path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[:depth]) in found for depth in range(1, len(parts)))

    return tuple(module for path, module in found.items() if not inside(path))


def _failed_expectations(
    rules: Sequence[Rule], planned: Sequence[PlannedSite], inventory: Inventory
) -> list[Unmatched]:
    """Return the rules that decide no site, or not as many as they expect."""
    decided = Counter(site.rule for site in planned)
    return [
        _unmatched_rule(rule, decided[rule.name], inventory.sites)
        for rule in rules
        if not rule.expect.accepts(decided[rule.name]) and not _only_shadowed(rule, decided[rule.name], planned)
    ]


def _only_shadowed(rule: Rule, decided: int, planned: Iterable[PlannedSite]) -> bool:
    """Whether the rule does match, but all that it matches is decided before: shown in the plan, no error."""
    default = rule.expect.minimum == 1 and rule.expect.maximum is None
    return default and decided == 0 and any(_matches(rule, site.site) for site in planned)


def _unmatched_rule(rule: Rule, found: int, sites: Sequence[Site]) -> Unmatched:
    pattern, expected, span = str(rule.match), str(rule.expect), rule.match_span
    if found:
        return Unmatched(rule.name, pattern, expected, found, (), "", "sites", span)
    almost = _almost(rule, sites)
    names = [] if almost else [path for site in sites for path in site.paths]
    near = dict.fromkeys(name for each in rule.match.name for name in nearest_names(each, names))
    return Unmatched(rule.name, pattern, expected, 0, tuple(near), almost, "sites", span)


def _almost(rule: Rule, sites: Sequence[Site]) -> str:
    """Return a site that has the rule's name, with what keeps it from matching."""
    for site in sites:
        if any(pattern.matches(path) for pattern in rule.match.name for path in site.paths):
            reason = rule.match.explain(site.paths, site.shape, site.op, site.classes)
            if reason is not None:
                return f"{site.path}, but {reason}"
    return ""


def _shadow_notes(rules: Sequence[Rule], planned: Sequence[PlannedSite]) -> list[str]:
    notes = []
    earlier: set[str] = set()
    for rule in rules:
        matched = [site for site in planned if _matches(rule, site.site)]
        taken = [site.rule for site in matched if site.rule in earlier]
        if taken:
            by = ", ".join(dict.fromkeys(f"'{name}'" for name in taken))
            notes.append(f"rule '{rule.name}' also matches {count(len(taken), 'site')} decided before it by {by}")
        if matched and all(site.rule is None for site in matched):
            notes.append(f"rule '{rule.name}' matches only what is trained whole")
        earlier.add(rule.name)
    return notes


def stale_parts(plan: Plan, inventory: Inventory) -> list[tuple[str, str, str]]:
    """Return (path, planned, found) for every site and every module trained whole in which a model differs."""
    sizes = {path: count(size, "parameter") for path, size in inventory.modules}
    trained = [(each.path, count(each.parameters, "parameter"), sizes.get(each.path, "nothing")) for each in plan.train]
    sites = differences((each.site for each in plan.sites), inventory.sites)
    return sites + [part for part in trained if part[1] != part[2]]


def on_modules(plan: Plan) -> Plan:
    """Return the plan with every site on the module backend, as asked for."""
    reason = 'backend="modules"'
    sites = tuple(replace(planned, backend="module", backend_reason=reason) for planned in plan.sites)
    return replace(plan, sites=sites, regions=(), capture=None)
