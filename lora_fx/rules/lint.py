"""What can be said of a rule file without a model.  Imports no torch."""

import os
from collections.abc import Iterator

from lora_fx.rules.patterns import NamePattern
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import Match, Rule, RuleSet

_EVERYTHING = Match(name=(NamePattern("**"),))


def lint(rules: str | os.PathLike[str] | RuleSet) -> tuple[RuleSet, list[str]]:
    """Return the rules (of a file, or read already) and warnings about rules that can never decide anything.

    Raises:
        RuleError: with every problem of the file.
    """
    ruleset = read_rules(rules)
    return ruleset, list(_never_reached(ruleset))


def _never_reached(ruleset: RuleSet) -> Iterator[str]:
    """Yield a warning for each rule whose match an earlier rule has, or that stands after one that takes all."""
    first: dict[Match, Rule] = {}
    for rule in ruleset.rules:
        where = f"{rule.span}: rule '{rule.name}'"
        if rule.match in first:
            yield f"{where} has the match of rule '{first[rule.match].name}' and never decides a site"
        elif _EVERYTHING in first:
            yield f"{where} stands after '{first[_EVERYTHING].name}', which matches everything"
        first.setdefault(rule.match, rule)
