"""rules_from_peft: a configuration of PEFT's → rules that choose the sites that PEFT would choose."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.discovery.sites import take_inventory
from lora_fx.errors import LoraFxWarning, RefusedError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.patterns import Patterns, plain_name
from lora_fx.files.adapter.tokens import ROWS
from lora_fx.integrations.peftchoice import Chosen, choices, listed, saved_modules, targets_for, ties_what_is_saved
from lora_fx.integrations.peftsettings import Settings, checked, for_model, lora_of, settings_of
from lora_fx.integrations.pefttargets import ALL_LINEAR
from lora_fx.integrations.pefttokens import entries_by_name, entries_for
from lora_fx.models.wrappers import check_module
from lora_fx.planning.decide import decide
from lora_fx.planning.planned import Inventory
from lora_fx.planning.sites import CONVOLUTIONS
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import EXPRESSION_PREFIX, NamePattern, glob_of
from lora_fx.rules.reader import read_rules
from lora_fx.text import listing

Given = str | os.PathLike[str] | Mapping[str, object] | object
RuleDict = dict[str, Any]
_SEGMENT_NOT_A_NUMBER = "[^.]*[^.0-9][^.]*"


def rules_from_peft(config: Given, model: nn.Module | None = None) -> RuleDict:
    """Return rules, as a dict that can be written as YAML, for the sites that PEFT would adapt with a configuration.

    The same sites with the same rank, scaling, dropout and first values, the same modules trained whole.  With the
    model each of its names is compared; where globs over names would mean other sites, the names themselves are listed.

    Args:
        config: a `peft.LoraConfig`, a dict of its settings, or the path of an `adapter_config.json` or its directory;
            PEFT need not be installed.
        model: the base, which stays unchanged and needs no weights.  Needed where a configuration is about the model:
            "all-linear", no `target_modules`, `layers_pattern`, patterns that are expressions.

    Raises:
        RuleError, AdapterFileError: no configuration of LoRA, or values that none can hold.
        RefusedError: what no rule can say, by its name; the model is needed; PEFT would refuse the model.
    """
    settings, source = settings_of(config)
    if model is None:
        rules = _by_name(checked(settings, source), settings)
    else:
        check_module(model)
        found = targets_for(for_model(settings, model), model)
        by_model = settings.get("target_modules") != found["target_modules"]
        rules = _for_model(checked(found, source), found, model, by_model)
    read_rules(rules)
    return rules


def _rule_file(lora: Settings, rules: Sequence[RuleDict], train: Sequence[str]) -> RuleDict:
    more = {"train": [*train]} if train else {}
    return {"version": 1, "defaults": lora, "rules": [*rules], **more}


def _with_beside(file: RuleDict, config: Configuration, tokens: Sequence[RuleDict]) -> RuleDict:
    """Return rules with what else of the model is trained: rows of embeddings, all biases."""
    rows = {"tokens": [*tokens]} if tokens else {}
    return {**file, **rows, **({"bias": "all"} if config.bias == "all" else {})}


# -- with names alone


class _NeedsModelError(Exception):
    """What the settings mean shows only with a model: which, and why."""


def _by_name(config: Configuration, settings: Settings) -> RuleDict:
    try:
        rules = _apart(_name_rules(config, settings))
        tokens = entries_by_name(config)
        if tokens is None:
            raise _NeedsModelError(ROWS, "those of the model's input embeddings")
        if ties_what_is_saved(config):
            raise _NeedsModelError("ensure_weight_tying", "what is tied to modules_to_save is trained too")
    except _NeedsModelError as error:
        raise RefusedError(
            "what the configuration means depends on the model",
            [(str(error.args[0]), str(error.args[1]))],
            "give the model too: rules_from_peft(config, model)",
        ) from error
    train = [f"**.*{glob_of(name)}" for name in settings.get("modules_to_save") or ()]
    heads = [name for name in config.modules_to_save if name not in (settings.get("modules_to_save") or ())]
    train += [f"**.*{{{','.join(heads)}}}"] if len(heads) > 1 else [f"**.*{head}" for head in heads]
    return _with_beside(_rule_file(lora_of(config, settings), rules, train), config, tokens)


def _apart(rules: Iterable[RuleDict]) -> list[RuleDict]:
    """Return rules without those that mean what an earlier one means: two keys of PEFT's may be one name."""
    first: dict[str, RuleDict] = {}
    for rule in rules:
        first.setdefault(rule["name"], rule)
    return [*first.values()]


def _name_rules(config: Configuration, settings: Settings) -> Iterator[RuleDict]:
    """Yield rules over names.

    Raises:
        _NeedsModelError: names do not tell.
    """
    targets = settings.get("target_modules")
    if targets is None and not config.target_parameters:
        raise _NeedsModelError("target_modules", "none: PEFT has some for each type of model")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        raise _NeedsModelError("target_modules", f"'{ALL_LINEAR}'")
    parameters = [_Meaning(name.removesuffix(".weight"), False) for name in config.target_parameters]
    yield from _ranked("target_parameters", parameters, config)
    rules = [*_excluding(config)]
    if isinstance(config.target_modules, str) or config.layers:
        rules += _expression_rules(config)
    else:
        rules += _ranked("target_modules", [_Meaning(name, False) for name in config.target_modules], config)
    yield from rules
    yield from (_of_attention(rule) for rule in rules)


def _excluding(config: Configuration) -> Iterator[RuleDict]:
    if names := _patterns("exclude_modules", config.excluded):
        why = {"skip": "is one of exclude_modules", "expect": "any"}
        yield {"name": "exclude_modules", "match": {"name": names}, **why}


def _of_attention(rule: RuleDict) -> RuleDict:
    """Return a rule for what PEFT adapts together with a torch.nn.MultiheadAttention that is a target."""
    names = [
        rf"{EXPRESSION_PREFIX}({_without_anchors(name.removeprefix(EXPRESSION_PREFIX))})\.out_proj"
        if name.startswith(EXPRESSION_PREFIX)
        else f"{name}.out_proj"
        for name in rule["match"]["name"]
    ]
    lora = {"lora": {**rule["lora"]}} if "lora" in rule else {}
    return {**rule, "name": f"{rule['name']} (torch's attention)", "match": {"name": names}, **lora, "expect": "any"}


def _without_anchors(expression: str) -> str:
    """Return an expression that more may be put around: `^` and `$` of one that must match a whole name say nothing.

    >>> _without_anchors("^model[.].*_proj$"), _without_anchors(r"a\\$")
    ('model[.].*_proj', 'a\\\\$')
    """
    inside = expression.removeprefix("^")
    ended = inside.removesuffix("$")
    is_escaped = (len(ended) - len(ended.rstrip("\\"))) % 2 == 1
    return inside if is_escaped else ended


def _expression_rules(config: Configuration) -> Iterator[RuleDict]:
    if config.rank_pattern.items() or config.alpha_pattern.items():
        raise _NeedsModelError("rank_pattern, alpha_pattern", "beside an expression or layers_to_transform")
    if any(part.isdecimal() for name in config.target_modules for part in name.split(".")[:-1]) and config.layers:
        raise _NeedsModelError("layers_to_transform", "beside a target that has the number of a layer")
    if config.layers_pattern:
        raise _NeedsModelError("layers_pattern", "which number of a name is that of a layer")
    if isinstance(config.target_modules, str):
        expression = config.target_modules
    else:
        ends, layers = "|".join(map(re.escape, config.target_modules)), "|".join(map(str, sorted(config.layers)))
        inside = rf"[^.]+\.[^.]+(\.{_SEGMENT_NOT_A_NUMBER})*\.({layers})\.(.*\.)?"
        expression = f"({inside})?({ends})"
    yield {"name": "target_modules", "match": {"name": _patterns("target_modules", expression)}}


def _patterns(key: str, names: str | Mapping[str, None]) -> list[str]:
    """Return what a rule writes for an expression or for ends of names."""
    if not isinstance(names, str):
        return [f"**.{glob_of(name)}" for name in names]
    try:
        return [NamePattern(EXPRESSION_PREFIX + names).text]
    except PatternError as error:
        raise _NeedsModelError(key, str(error)) from error


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a name in a configuration means: itself alone, or every name that ends with it after a dot."""

    name: str
    is_whole: bool

    def and_(self, other: "_Meaning") -> "_Meaning | None":
        """Return what both mean; None for nothing."""
        long, short = (self, other) if len(self.name) >= len(other.name) else (other, self)
        if not f".{long.name}".endswith(f".{short.name}") or (short.is_whole and long.name != short.name):
            return None
        return _Meaning(long.name, long.is_whole or short.is_whole)

    @property
    def glob(self) -> str:
        return glob_of(self.name) if self.is_whole else f"**.{glob_of(self.name)}"


def _ranked(what: str, targets: Sequence[_Meaning], config: Configuration) -> Iterator[RuleDict]:
    """Yield a rule for each rank and alpha that patterns give to targets, and one for all others; the first decides."""
    ranks, alphas = _entries("rank_pattern", config.rank_pattern), _entries("alpha_pattern", config.alpha_pattern)
    for rank_names, r in (*ranks, (None, None)):
        for alpha_names, alpha in (*alphas, (None, None)):
            lora = {key: value for key, value in (("r", r), ("alpha", alpha)) if value is not None}
            meant = [name for target in targets if (name := _meant(target, rank_names, alpha_names)) is not None]
            if not meant:
                continue
            rule = {"name": what, "match": {"name": [*dict.fromkeys(name.glob for name in meant)]}}
            if lora:
                words = ", ".join(f"{key} {value:g}" for key, value in lora.items())
                suffix = [name.glob for name in (rank_names, alpha_names) if name is not None]
                rule |= {"name": f"{words}: {', '.join(suffix)}", "lora": lora, "expect": "any"}
            yield rule


def _meant(target: _Meaning, *patterns: _Meaning | None) -> _Meaning | None:
    both: _Meaning | None = target
    for pattern in patterns:
        both = both if pattern is None or both is None else both.and_(pattern)
    return both


def _entries(key: str, patterns: Patterns[Any]) -> list[tuple[_Meaning | None, Any]]:
    entries: list[tuple[_Meaning | None, Any]] = []
    for pattern, value in patterns.items():
        plain = plain_name(pattern)
        if plain is None:
            raise _NeedsModelError(key, f"`{pattern:.80}` is an expression")
        entries.append((_Meaning(*plain), value))
    return entries


# -- with a model


def _for_model(config: Configuration, settings: Settings, model: nn.Module, by_model: bool) -> RuleDict:
    """Return rules for a model; `by_model` says whether the targets in the settings come from it."""
    lora, train, inventory = lora_of(config, settings), saved_modules(config, model), take_inventory(model)
    chosen, tokens = choices(config, inventory, model), entries_for(config, model)

    def finished(rules: Sequence[RuleDict]) -> RuleDict:
        return _with_beside(_rule_file(lora, rules, train), config, tokens)

    _warn_of_groups(chosen, inventory, model)
    try:
        rules = [] if by_model else _apart(_name_rules(config, settings))
    except _NeedsModelError:
        rules = []
    if rules:
        decided, used = _decided(_rule_file(lora, rules, train), inventory)
        if decided == chosen:
            return finished([rule for rule in rules if rule["name"] in used])
    return finished(listed(chosen, inventory, config))


def _warn_of_groups(chosen: Chosen, inventory: Inventory, model: nn.Module) -> None:
    """PEFT's A of a grouped convolution reads the channels of all groups, which no weight of the layer does."""
    convolutions = [site for site in inventory.sites if site.path in chosen and site.op in CONVOLUTIONS]
    grouped = [site.path for site in convolutions if getattr(model.get_submodule(site.owner), "groups", 1) > 1]
    if grouped:
        text = f"{listing(grouped)}: PEFT mixes the groups of the convolution; here each has r filters of its own"
        warnings.warn(text, LoraFxWarning, stacklevel=4)


def _decided(file: RuleDict, inventory: Inventory) -> tuple[Chosen, set[str | None]]:
    """Return the sites that rules adapt, and the names of the rules that decide any."""
    read = read_rules(file)
    loras = {rule.name: rule.lora for rule in read.rules}
    decided = {site.path: site.rule for site in decide(read, inventory, strict=False).sites if site.rule is not None}
    adapted = {path: lora for path, rule in decided.items() if (lora := loras[rule]) is not None}
    return {path: (lora.r, lora.alpha) for path, lora in adapted.items()}, {*decided.values()}
