"""Rules and an inventory in, a Plan out: what will happen to every site, and why.  Pure data; nothing is changed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lora_fx.errors import MOST_SHOWN, NoMatchError, StalePlanError, Unmatched
from lora_fx.planning.banks import at_site, unfit_for_bank
from lora_fx.planning.beside import modules_of, tables_of, trained_biases, trained_modules, trained_rows
from lora_fx.planning.decisions import Decisions
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import (
    IN_A_GRAPH,
    Inventory,
    PlannedSite,
    TrainedModule,
    TrainedRows,
    dead_notes,
    rank_notes,
    trained_whole,
    unfit_for_dora,
    unfit_for_init,
    unfit_for_invocation,
)
from lora_fx.planning.sites import CONVOLUTIONS, Site, differences
from lora_fx.rules.patterns import NamePattern, nearest_names
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import Rule, RuleSet
from lora_fx.text import count, listing, shortened

_MOST_SUGGESTED = 20


def decide(rules: RuleSet, inventory: Inventory, strict: bool = True) -> Decisions:
    """Return what the rules want of each site: the first rule that matches it decides.

    Raises:
        NoMatchError: if `strict`, naming every rule that decides no site, or not as many as it expects, and every
            pattern under `train:` that matches no module.
    """
    trained = trained_modules(rules.train, inventory)
    matched = [_matched(rule, inventory.sites) for rule in rules.rules]
    first: dict[int, Rule] = {}
    for rule, positions in zip(rules.rules, matched, strict=True):
        for position in positions:
            first.setdefault(position, rule)
    sites = tuple(_decide_site(site, first.get(at), trained) for at, site in enumerate(inventory.sites))
    sites = tuple(_outside_of_graphs(site) for site in sites) if inventory.in_graph is not None else sites
    notes = (*_shadow_notes(rules.rules, matched, sites), *rank_notes(sites), *dead_notes(sites))
    decided = Counter(site.rule for site in sites)
    if strict and (failed := _failed_expectations(rules, matched, decided, inventory)):
        raise NoMatchError(failed[:MOST_SHOWN], len(inventory.sites), len(failed[MOST_SHOWN:]))
    return Decisions(
        tokens=trained_rows(rules, inventory, sites, trained),
        biases=trained_biases(rules, inventory, sites, trained),
        model=inventory.model,
        source=rules.source,
        sites=sites,
        train=trained,
        total=inventory.total,
        fingerprint=inventory.fingerprint,
        notes=notes,
        unmatched_rules=tuple(rule.name for rule in rules.rules if rule.name not in decided),
        rules=rules.to_dict(),
    )


def _matched(rule: Rule, sites: Sequence[Site]) -> list[int]:
    """Return the positions of the sites that a rule matches; each rule is asked once, since there may be many."""
    return [position for position, site in enumerate(sites) if site.fits(rule.match)]


def _decide_site(site: Site, rule: Rule | None, trained: Sequence[TrainedModule]) -> PlannedSite:
    if whole := trained_whole(site, trained):
        return whole
    if rule is None:
        return PlannedSite(site, "keep", "no rule")
    if rule.skip is not None:
        return PlannedSite(site, "skip", rule.skip, rule.name)
    if refusal := site.refusal or _unsupported(rule, site):
        return PlannedSite(site, "refuse", refusal, rule.name)
    per_call = rule.per_call and site.calls != 1
    origin = f"{rule.name} (line {rule.span.line})" if rule.span.line else rule.name
    lora = None if rule.lora is None else at_site(site, rule.lora)
    return PlannedSite(site, "adapt", origin, rule.name, lora, rule.slices, per_call)


def _outside_of_graphs(planned: PlannedSite) -> PlannedSite:
    """Return what is done at a site of a GraphModule, whose nodes cannot be told from where on an adapter acts."""
    if planned.lora is None or not planned.lora.invocation:
        return planned
    return PlannedSite(planned.site, "refuse", IN_A_GRAPH, planned.rule)


def _unsupported(rule: Rule, site: Site) -> str | None:
    """Return why a site cannot have the adapter that its rule wants; None if it can."""
    assert rule.lora is not None
    if rule.slices is not None:
        if site.op in (*CONVOLUTIONS, "embedding"):
            return f"slices are for weights with parts among their rows, not for {site.op}"
        try:
            rule.slices.ranges(site.features[0])
        except ValueError as problem:
            return str(problem)
    if rule.lora.lora_fa and site.op == "embedding":
        return "LoRA-FA would leave A of an embedding at zero, where it starts; leave out `lora_fa`"
    each_call = rule.per_call and site.calls != 1
    unfit = unfit_for_dora(site, rule.lora, each_call)
    unfit = unfit or unfit_for_init(site, rule.lora, rule.slices is not None, each_call)
    if unfit:
        return unfit
    if unfit := unfit_for_bank(site, rule.lora, rule.slices is not None):
        return unfit
    if unfit := unfit_for_invocation(site, rule.lora):
        return unfit
    if rule.per_call and site.calls is None:
        return "per_call needs example_inputs: without them nothing shows how often it is called"
    if rule.per_call and site.calls != 1 and (site.read or site.parameter):
        return "per_call is for layers that are called; code reads this weight, which does not show which call it is"
    return None


def _failed_expectations(
    rules: RuleSet, matched: Sequence[Sequence[int]], decided: Counter[str | None], inventory: Inventory
) -> list[Unmatched]:
    """Return the patterns under `train:` that match nothing, and rules that decide fewer or more sites than expected.

    A rule of which all matches are decided before has not failed: the plan shows it.  What is nearest is looked up for
    the first ones.
    """
    modules = [path for path, _ in inventory.modules if path]
    names = [path for site in inventory.sites for path in site.paths]
    failed: list[tuple[Unmatched, tuple[NamePattern, ...], list[str]]] = []
    tables = [path for table in inventory.tables for path in table.paths]
    for wanted in rules.tokens:
        if not tables_of(wanted, inventory):
            text = shortened(listing((pattern.text for pattern in wanted.name), 60), 1000)
            unmatched = Unmatched("tokens", text, "at least one", 0, what="embeddings", span=wanted.span)
            failed.append((unmatched, wanted.name, tables))
    for pattern in rules.train:
        if not modules_of(pattern, inventory):
            unmatched = Unmatched("train", pattern.pattern.text, "at least one", 0, what="modules", span=pattern.span)
            failed.append((unmatched, (pattern.pattern,), modules))
    for rule, positions in zip(rules.rules, matched, strict=True):
        number, expect = decided[rule.name], rule.expect
        is_shadowed = not number and expect.minimum == 1 and expect.maximum is None
        if is_shadowed and positions:
            continue
        if not expect.accepts(number):
            almost = "" if number or len(failed) >= MOST_SHOWN else _almost(rule, inventory.sites)
            name, match = shortened(rule.name), shortened(str(rule.match), 1000)
            unmatched = Unmatched(name, match, str(expect), number, almost=almost, span=rule.match_span)
            failed.append((unmatched, () if number or almost else rule.match.name, names))
    return [
        replace(
            unmatched, nearest=tuple(dict.fromkeys(n for pattern in patterns for n in nearest_names(pattern, known)))
        )
        for unmatched, patterns, known in failed[:_MOST_SUGGESTED]
    ] + [unmatched for unmatched, _, _ in failed[_MOST_SUGGESTED:]]


def _almost(rule: Rule, sites: Sequence[Site]) -> str:
    """Return a site that has the rule's name, with what keeps it from matching."""
    for site in sites:
        named = any(pattern.matches(path) for pattern in rule.match.name for path in site.paths)
        if named and (reason := site.mismatch(rule.match)):
            return f"{site.path}, but {reason}"
    return ""


def _shadow_notes(rules: Sequence[Rule], matched: Sequence[Sequence[int]], planned: Sequence[PlannedSite]) -> list[str]:
    notes = []
    earlier: set[str] = set()
    for rule, positions in zip(rules, matched, strict=True):
        taken = [planned[at].rule for at in positions if planned[at].rule in earlier]
        name = shortened(rule.name)
        if taken:
            by = listing(f"'{shortened(str(other))}'" for other in dict.fromkeys(taken))
            notes.append(f"rule '{name}' also matches {count(len(taken), 'site')} decided before it by {by}")
        if positions and all(planned[at].rule is None for at in positions):
            notes.append(f"rule '{name}' matches only what is trained whole")
        earlier.add(rule.name)
    return notes


def still_fitting(plan: Plan, inventory: Inventory) -> Decisions:
    """Return what a plan that was made before decides, if the model still has what the plan is about.

    What the plan says is not relied on: its sites must be those of the model in every fact, and what it decides must be
    what its rules decide there.

    Raises:
        StalePlanError: naming every site and every module trained whole in which the plan differs from the model, or
            from its own rules.
    """
    sizes = {path: count(size, "parameter") for path, size in inventory.modules}
    trained = [(part.path, count(part.parameters, "parameter"), sizes.get(part.path, "nothing")) for part in plan.train]
    stale = differences((site.site for site in plan.sites), inventory.sites)
    stale += [part for part in trained if part[1] != part[2]]
    if not stale:
        stale = _otherwise_decided(plan, inventory)
    if stale:
        raise StalePlanError(stale)
    return Decisions(**plan.decided())


def check_used(decisions: Decisions, inventory: Inventory) -> None:
    """Raise a StalePlanError where a run shows that an adapted weight is used otherwise than a plan says.

    Calls may differ from run to run, unless each has an adapter.
    """
    shown = {site.path: site for site in inventory.sites}
    stale = []
    for planned in decisions.adapted:
        old, new = planned.site, shown.get(planned.path)
        if new is not None:
            calls = new.calls if planned.per_call else old.calls
            new = replace(old, op=new.op, layout=new.layout, shape=new.shape, refusal=new.refusal, calls=calls)
        stale += differences([old], [] if new is None else [new])
    if stale:
        raise StalePlanError(stale)


def _otherwise_decided(plan: Plan, inventory: Inventory) -> list[tuple[str, str, str]]:
    """Return (path, planned, by the rules) for what a plan says otherwise than its rules and the model do."""
    anew = decide(read_rules(plan.rules), inventory, strict=False)
    decided = {planned.path: _doing(planned) for planned in anew.sites}
    states = ((old.path, _doing(old), decided[old.path]) for old in plan.sites)
    changed = [state for state in states if state[1] != state[2]]
    sums = (("fingerprint", plan.fingerprint, anew.fingerprint), ("parameters", plan.total, anew.total))
    modules = (("train", *(", ".join(part.path for part in which.train) for which in (plan, anew))),)
    parts = (
        ("tokens", _parts(plan.tokens), _parts(anew.tokens)),
        ("biases", _parts(plan.biases), _parts(anew.biases)),
    )
    return changed + [(what, str(old), str(new)) for what, old, new in (*sums, *modules, *parts) if old != new]


def _parts(trained: Sequence[TrainedModule | TrainedRows]) -> str:
    return ", ".join(str(part) for part in trained) or "nothing"


def _doing(planned: PlannedSite) -> str:
    """Return all that is decided of a site, in words."""
    facts = {
        "rule": planned.rule,
        **({} if planned.lora is None else planned.lora.to_dict()),
        "slices": planned.slices and planned.slices.to_dict(),
        "per_call": planned.per_call,
    }
    return " ".join([planned.decision, *(f"{key}={value}" for key, value in facts.items() if value)])


def on_modules(decisions: Decisions, in_graph: frozenset[str] = frozenset(), reason: str = 'backend="modules"') -> Plan:
    """Return the plan with every site on the module backend, for a reason, except those in a model's own graph."""
    sites = (
        replace(site, backend="graph", backend_reason="")
        if site.path in in_graph
        else replace(site, backend="module", backend_reason=reason)
        for site in decisions.sites
    )
    return Plan.of(decisions, sites=tuple(sites))
