"""What PEFT would adapt in a model, site by site, and rules that say so by names."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from lora_fx.errors import RefusedError
from lora_fx.files.adapter.configuration import Configuration
from lora_fx.files.adapter.names import ends_of, has_end
from lora_fx.files.adapter.patterns import whole_match
from lora_fx.integrations.pefttargets import ALL_LINEAR, CLASSIFIERS, EMBEDDINGS
from lora_fx.models.layers import kind_of, linear_layout, model_type
from lora_fx.models.swap import original_class
from lora_fx.planning.draft.peftdefaults import DEFAULT_TARGETS
from lora_fx.planning.planned import Inventory
from lora_fx.planning.sites import Site
from lora_fx.rules.patterns import glob_of

Chosen = dict[str, tuple[int, float]]
"""Rank and alpha by the path of a site."""


def targets_for(settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the settings with the targets that PEFT would find in the model, where they do not name them.

    Raises:
        RefusedError: PEFT knows none for the model.
    """
    targets = settings.get("target_modules")
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return settings | {"target_modules": _all_linear(model, settings.get("task_type"))}
    if targets is not None:
        return settings
    kind = model_type(model)
    if kind not in DEFAULT_TARGETS and not settings.get("target_parameters"):
        raise RefusedError(
            "the configuration has no target_modules, and PEFT has none for this model",
            [("model_type", kind), ("PEFT has some for", ", ".join(sorted(DEFAULT_TARGETS)))],
            "name them",
        )
    return settings | {"target_modules": DEFAULT_TARGETS.get(kind)}


def _all_linear(model: nn.Module, task: object) -> list[str]:
    """Return the names of all linears but the head of a transformers model: "all-linear" of PEFT."""
    head = None
    if any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        head = model.get_output_embeddings()  # type: ignore[operator]
        if head is None and str(getattr(task, "value", task)) == "SEQ_CLS":
            head = next(filter(None, (getattr(model, name, None) for name in CLASSIFIERS)), None)
    linears = (
        path
        for path, module in model.named_modules()
        if module is not head and (isinstance(module, nn.Linear) or linear_layout(type(module)) is not None)
    )
    return sorted(filter(None, linears))


def saved_modules(config: Configuration, model: nn.Module) -> list[str]:
    """Return what rules have under `train` for PEFT's modules_to_save: it means every module whose path ends so.

    Raises:
        RefusedError: PEFT would train two weights where the model has one.
    """
    _refuse_parted(config, model)
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    patterns = []
    for name in config.modules_to_save:
        ends = [path for path in paths if path.endswith(name)]
        if ends:
            is_segment = all(has_end(path, (name,)) for path in ends)
            patterns.append(f"**.{'' if is_segment else '*'}{glob_of(name)}")
    return patterns + [glob_of(path) for path in _tied_to_saved(config, model)]


def _refuse_parted(config: Configuration, model: nn.Module) -> None:
    if ties_what_is_saved(config):
        return
    first: dict[int, str] = {}
    facts = []
    for path, module in model.named_modules():
        weight = module._parameters.get("weight") if path.endswith(tuple(config.modules_to_save)) else None
        if weight is not None and (other := first.setdefault(id(weight), path)) != path:
            facts.append((path, f"is tied to {other}, and PEFT trains a copy of each"))
    if facts:
        advice = "set ensure_weight_tying=True, which trains the one weight, or leave one of them out"
        raise RefusedError("modules_to_save would become two weights of one", facts, advice)


def ties_what_is_saved(config: Configuration) -> bool:
    """Whether PEFT trains what is tied to one of modules_to_save with it, as one weight."""
    return config.ensure_weight_tying and any(has_end(name, EMBEDDINGS) for name in config.modules_to_save)


def _tied_to_saved(config: Configuration, model: nn.Module) -> list[str]:
    if not ties_what_is_saved(config):
        return []
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules() if path}
    saved = {path for path in weights if path.endswith(tuple(config.modules_to_save))}
    tied = {id(weights[path]) for path in saved if weights[path] is not None and has_end(path, EMBEDDINGS)}
    return [path for path, weight in weights.items() if id(weight) in tied and path not in saved]


def choices(config: Configuration, inventory: Inventory, model: nn.Module) -> Chosen:
    """Return the sites that PEFT would adapt.

    Raises:
        RefusedError: PEFT would refuse the model or adapt something else than the site; names all that is in the way.
    """
    attentions = {path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    chosen: Chosen = {}
    for site in inventory.sites:
        key = _key(site, config, attentions)
        if key is not None:
            chosen[site.path] = config.rank_at(key), config.alpha_at(key)
    problems = [*_problems(config, model, attentions), *_shared(chosen, inventory, config)]
    if problems:
        raise RefusedError("PEFT would refuse these targets, or adapt them otherwise", problems)
    if not chosen:
        raise RefusedError("PEFT would find nothing to adapt in this model")
    return chosen


def _key(site: Site, config: Configuration, attentions: Collection[str]) -> str | None:
    """Return the name by which PEFT's patterns know a site that it would adapt; None if it would not."""
    if has_end(site.weight, config.target_parameters):
        return site.weight
    owner, _, last = site.path.rpartition(".")
    if site.parameter:  # the projections of an attention are adapted with it
        return site.owner if site.owner in attentions and config.claims(site.owner, whole_match) else None
    if last == "out_proj" and owner in attentions and config.claims(owner, whole_match):
        return owner
    return site.path if site.path and config.claims(site.path, whole_match) else None


def _problems(config: Configuration, model: nn.Module, attentions: Collection[str]) -> Iterator[tuple[str, str]]:
    saved = tuple(config.modules_to_save)
    for path, module in model.named_modules():
        if not path or not config.claims(path, whole_match):
            continue
        if kind_of(module) is None and path not in attentions:
            yield path, f"is a {original_class(module).__name__}, which PEFT does not adapt"
        elif saved and any(f"{end}.".endswith(tuple(f"{name}." for name in saved)) for end in _owners(path)):
            yield path, "PEFT would adapt it, and train it whole: its name ends like one of modules_to_save"
    for name in config.target_parameters:
        own = [key for key in model._parameters if has_end(key, (name,))]
        yield from ((key, "is the model's own parameter, which PEFT cannot adapt") for key in own)


def _owners(path: str) -> Iterator[str]:
    """Yield a path and those of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _shared(chosen: Chosen, inventory: Inventory, config: Configuration) -> Iterator[tuple[str, str]]:
    """Yield the chosen modules with several names: PEFT adapts one of them, and leaves the others the base's."""
    modules = {path for path, _ in inventory.modules}
    for site in inventory.sites:
        others = [] if site.parameter else [path for path in site.aliases if path in modules]
        if others and site.path in chosen:
            yield site.path, f"is also {others[0]}: PEFT would adapt it under one of its names only"


def listed(chosen: Chosen, inventory: Inventory, config: Configuration) -> list[dict[str, Any]]:
    """Return rules that mean exactly these sites: ends of names where they mean no other site, one rule for each rank
    and alpha, the most common first.
    """
    groups: dict[tuple[int, float], list[Site]] = {}
    for site in inventory.sites:
        if site.path in chosen:
            groups.setdefault(chosen[site.path], []).append(site)
    ends: dict[str, set[int]] = {}
    """Which sites an end means, by their positions."""
    for position, site in enumerate(inventory.sites):
        for end in (end for path in site.paths for end in ends_of(path)):
            ends.setdefault(end, set()).add(position)
    positions = {site.path: position for position, site in enumerate(inventory.sites)}
    rules = []
    for (r, alpha), sites in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        wanted = {positions[site.path] for site in sites}
        names = _shortest(sites, wanted, ends)
        own = {"r": (r, config.r), "alpha": (alpha, config.lora_alpha)}
        lora = {key: value for key, (value, default) in own.items() if value != default}
        more = {"lora": lora} if lora else {}
        rules.append({"name": f"r {r}, alpha {alpha:g}", "match": {"name": names}, **more})
    return rules


def _shortest(sites: Sequence[Site], wanted: set[int], ends: dict[str, set[int]]) -> list[str]:
    """Return globs that mean the wanted sites and no other, short ones first."""
    names: list[str] = []
    left = set(wanted)
    for site in sites:
        fitting = [end for end in [*ends_of(site.path)][::-1] if ends[end] <= wanted]
        end = fitting[0] if fitting else None
        if end is None:
            names.append(glob_of(site.path))
        elif ends[end] & left:
            names.append(f"**.{glob_of(end)}")
            left -= ends[end]
    return names
