"""Why a site is adapted or not: what each rule says of it, in their order.  Pure data; no torch here."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

from lora_fx.errors import LONGEST_NAME, MOST_SHOWN, LoraFxError
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory, PlannedSite
from lora_fx.planning.sites import Site
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import NamePattern, glob_of, nearest_names
from lora_fx.rules.ruleset import Rule, RuleSet
from lora_fx.text import columns, count, listing, shortened, thousands, visible

Teller = Callable[[PlannedSite], Iterable[str]]
"""Tells in lines how a site will be computed: in which order of products, and what makes it cheaper or why not."""


class UnknownPathError(LoraFxError, ValueError):
    """There is nothing at a path."""


def explain(plan: Plan, rules: RuleSet, inventory: Inventory, path: str, teller: Teller) -> str:
    """Return why the sites at a path (a site's name, one of its aliases, a glob, or a module with sites in it) are
    adapted or not.

    Raises:
        UnknownPathError: nothing bears the name; tells the nearest names.
    """
    exact = [planned for planned in plan.sites if path in (*planned.site.paths, planned.site.weight)]
    if named := exact or _matched(plan, path):
        parts = [_explained(planned, rules, teller(planned)) for planned in named[:MOST_SHOWN]]
        left = named[MOST_SHOWN:]
        return "\n\n".join([*parts, *([f"… and {count(len(left), 'more site')}"] if left else [])])
    inside = [planned for planned in plan.sites if planned.path.startswith(f"{path}.")]
    if inside:
        rows = [(planned.path, planned.site.text(), planned.decision, planned.reason) for planned in inside]
        return f"{visible(path)} is not a site; these lie in it:\n{columns(rows)}"
    raise UnknownPathError(_unknown(inventory, path))


def _matched(plan: Plan, path: str) -> list[PlannedSite]:
    pattern = _pattern(path)
    return [planned for planned in plan.sites if pattern and any(map(pattern.matches, planned.site.paths))]


def _pattern(path: str) -> NamePattern | None:
    """Return what a path means: a glob if it can be read as one, else the name alone; None if no name is like it."""
    for text in (path, glob_of(path)):
        with contextlib.suppress(PatternError):
            return NamePattern(text)
    return None


def _unknown(inventory: Inventory, path: str) -> str:
    if path in dict(inventory.modules):
        return f"{path} is a module without a weight that multiplies an activation"
    names = [name for site in inventory.sites for name in site.paths]
    pattern = _pattern(path)
    near = nearest_names(pattern, names) if pattern else ()
    return f"the model has nothing called {shortened(path, LONGEST_NAME)}" + (
        f"; nearest: {listing(near, 3)}" if near else ""
    )


def _explained(planned: PlannedSite, rules: RuleSet, computed: Iterable[str]) -> str:
    lines = [visible(planned.path), columns(_facts(planned.site)), "", f"  {_verdict(planned)}"]
    lines += [f"  {told}" for told in computed]
    return "\n".join([*lines, _rule_lines(planned, rules.rules)])


def _facts(site: Site) -> list[tuple[str, str]]:
    stored = "" if site.layout == "out_in" else ", stored as [in, out]"
    facts = [("weight", f"{site.text()}, {site.op}, {site.dtype}{stored}")]
    if site.aliases:
        facts.append(("also called", ", ".join(map(visible, site.aliases))))
    if site.tied_to:
        facts.append(("tied to", f"{', '.join(map(visible, site.tied_to))}, which an adapter here leaves alone"))
    if site.calls is not None:
        facts.append(("used", f"{count(site.calls, 'time')} in a forward with the example inputs"))
    if site.read:
        facts.append(("read", "code reads the weight; whatever is computed with it sees the adapter"))
    return facts


def _verdict(planned: PlannedSite) -> str:
    if planned.decision != "adapt" or planned.lora is None:
        return f"{planned.decision}: {planned.reason}"
    why = f" ({planned.backend_reason})" if planned.backend_reason else ""
    parts = "" if planned.slices is None else f" on {', '.join(planned.slices.adapt)}"
    parts += f" one {planned.lora.share} for all" if planned.lora.share != "none" else ""
    size = f"r={planned.lora.r} scaling={planned.lora.scaling:g}{parts}, {thousands(planned.trainable)} parameters"
    return f"adapt by {planned.reason}: {size}; backend {planned.backend}{why}"


def _rule_lines(planned: PlannedSite, rules: Sequence[Rule]) -> str:
    """Return a line for each rule: why it does not match, that it decides, or that it comes too late."""
    rows, decided = [], "train:" if planned.decision == "train" else ""
    shown = [rule for at, rule in enumerate(rules) if at < MOST_SHOWN or planned.site.fits(rule.match)]
    for rule in shown:
        reason = planned.site.mismatch(rule.match)
        if reason is None:
            reason = f"would match, but {decided} decides" if decided else "matches, and decides"
            decided = decided or "an earlier rule"
        rows.append((f"  {shortened(rule.name)}", reason))
    left = len(rules) - len(shown)
    return columns([*rows, *([("  …", f"and {count(left, 'more rule')} that do not match")] if left else [])])
