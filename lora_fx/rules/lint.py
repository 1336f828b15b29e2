"""What can be said of a rule file without a model.  Imports no torch."""

import os
from collections.abc import Iterator

from lora_fx.errors import MOST_SHOWN
from lora_fx.rules.patterns import NamePattern
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import Match, Rule, RuleSet
from lora_fx.text import shortened

_EVERYTHING = Match(name=(NamePattern("**"),))


def lint(rules: str | os.PathLike[str] | RuleSet) -> tuple[RuleSet, list[str]]:
    """Return the rules (of a file, or read already) and warnings about rules that can never decide anything.

    Raises:
        RuleError: with every problem of the file.
    """
    ruleset = read_rules(rules)
    warnings = list(_never_reached(ruleset))
    more = [f"… and {len(warnings) - MOST_SHOWN:,} more warnings"] if len(warnings) > MOST_SHOWN else []
    return ruleset, warnings[:MOST_SHOWN] + more


def _never_reached(ruleset: RuleSet) -> Iterator[str]:
    """Yield a warning for each rule whose match an earlier rule has, or that stands after one that takes all."""
    first: dict[Match, Rule] = {}
    for rule in ruleset.rules:
        where = f"{rule.span}: rule '{shortened(rule.name)}'"
        if rule.match in first:
            yield f"{where} has the match of rule '{shortened(first[rule.match].name)}' and never decides a site"
        elif _EVERYTHING in first:
            yield f"{where} stands after '{shortened(first[_EVERYTHING].name)}', which matches everything"
        first.setdefault(rule.match, rule)
