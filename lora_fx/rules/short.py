"""Rules without a file: `apply(model, r=8, target="attention")`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lora_fx.errors import Problem, RuleError
from lora_fx.rules import shipped
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet

Target = str | Sequence[str]
DEFAULT = "attention"
_SOURCE = "target, r, alpha"
Given = TypeVar("Given")


def rules_or_short(rules: Given | None, target: Target | None, r: int | None, alpha: float | None) -> Given | RuleSet:
    """Return the rules that are given, or those that the other three stand for.

    Raises:
        RuleError: both are given, or neither; or as `short_rules`.
    """
    short = [name for name, value in (("target", target), ("r", r), ("alpha", alpha)) if value is not None]
    if rules is None and not short:
        hint = 'give rules (a path, a shipped name, a dict), or target="attention" and r=8'
        raise RuleError(_SOURCE, [Problem("nothing says what is to be adapted", hint=hint)])
    if rules is not None and short:
        what = f"{' and '.join(short)} cannot stand beside rules or a plan"
        raise RuleError(_SOURCE, [Problem(what, hint="write them into the rules, or leave the rules out")])
    return short_rules(target, r, alpha) if rules is None else rules


def short_rules(target: Target | None = None, r: int | None = None, alpha: float | None = None) -> RuleSet:
    """Return the rules that a target, a rank and an alpha stand for; each glob is a rule, and must match.

    Args:
        target: name of a shipped rule file, or globs over the names of weights; one without a dot and a wildcard
            (`q_proj`) means modules of that name anywhere.  None: `attention`.
        r: None is that of the shipped file, or the default of rule files.
        alpha: None is 2 · r.

    Raises:
        RuleError: no globs, or a value that no rule can have.
    """
    wanted = DEFAULT if target is None else target
    if isinstance(wanted, (list, tuple)) and not wanted:
        raise RuleError(_SOURCE, [Problem("target is an empty list", hint='give names, as target=["q_proj"]')])
    scale = 2 * r if alpha is None and isinstance(r, int) and r > 0 else alpha
    lora = {name: value for name, value in (("r", r), ("alpha", scale)) if value is not None}
    file = read_rules(wanted) if isinstance(wanted, str) and wanted in shipped.names() else None
    globs: list[object] = ["**"] if file else [*wanted] if isinstance(wanted, (list, tuple)) else [wanted]
    rules = [{"name": str(glob), "match": {"name": _anywhere(glob)}, "lora": lora} for glob in globs]
    read = replace(read_rules({"rules": rules}), source=f"target={','.join(map(str, globs))}")
    if file is None:
        return read
    checked = read.rules[0].lora
    chosen = {name: getattr(checked, name) for name in lora}
    adapting = (replace(rule, lora=replace(rule.lora, **chosen)) if rule.lora else rule for rule in file.rules)
    return replace(file, rules=tuple(adapting))


def _anywhere(glob: object) -> object:
    """Let a bare name mean modules of that name anywhere, as PEFT's `target_modules` does."""
    return f"**.{glob}" if isinstance(glob, str) and glob.isidentifier() else glob
