"""What a draft offers: the usual choice, what people take in its place, and what may stand beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lora_fx.planning.draft.covering import covering
from lora_fx.planning.draft.peftdefaults import DEFAULT_LORA, is_default_of_peft
from lora_fx.planning.draft.roles import LINEAR, Found, found_in, is_adapted_by, usual
from lora_fx.planning.planned import Inventory
from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import LoRAConfig
from lora_fx.rules.writing import Written

IN_THIRDS = ("c_attn", "qkv", "Wqkv", "in_proj", "in_proj_weight")
"""Fused weights of the shipped rules whose thirds are q, k and v in GPT-2, timm, MPT, ModernBERT and torch itself.

`qkv_proj` and `query_key_value` may have unequal parts, or those of each head together.
"""
_SHARED = "All layers of the rule above but the experts."
_EVERYWHERE = "All linear layers but the head, those outside of the blocks too."
_ALONE = "The linear layers alone."


@dataclass(frozen=True, slots=True)
class Offer:
    """Rules that a user may want, and what is said of them."""

    about: str
    rules: tuple[Mapping[str, Written], ...]
    sites: tuple[Found, ...]
    place: Literal["active", "instead", "beside"] = "instead"


@dataclass(frozen=True, slots=True)
class Ground:
    """The sites of a model, with what can be adapted of them."""

    inventory: Inventory
    kind: str = ""
    """The type of a transformers model."""
    found: tuple[Found, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "found", found_in(self.inventory.sites))

    @property
    def usable(self) -> tuple[Found, ...]:
        return tuple(one for one in self.found if one.site.refusal is None)

    def rule(self, name: str, chosen: Sequence[Found], lora: LoRAConfig, **more: Written) -> Mapping[str, Written]:
        """Return a rule that matches these sites and no others."""
        wanted = {one.site.path for one in chosen}
        others = [path for one in self.found if one.site.path not in wanted for path in one.site.paths]
        match = {"name": covering([one.site.path for one in chosen], others)}
        return {"name": name, "match": match, **more, "lora": {"r": lora.r, "alpha": lora.alpha}}

    def choice(self, name: str, about: str, chosen: Sequence[Found], lora: LoRAConfig) -> Offer | None:
        """Return one rule for all of these that are wide enough for its rank; None if there are none."""
        wide = tuple(one for one in chosen if one.narrow >= lora.r)
        about += "  What is narrower than r is left out." if len(wide) < len(chosen) else ""
        return Offer(about, (self.rule(name, wide, lora),), wide) if wide else None


def rank_of(choice: Offer) -> int:
    """Return the highest rank of a choice's rules."""
    return max(lora.r for rule in read_rules({"rules": list(choice.rules)}).rules if (lora := rule.lora) is not None)


def fitted(chosen: Sequence[Found], lora: LoRAConfig) -> LoRAConfig:
    """Return the adapter with its rank and alpha halved until half of the sites, or more, are as wide as its rank."""
    while lora.r > 1 and 2 * sum(one.narrow < lora.r for one in chosen) > len(chosen):
        lora = replace(lora, r=lora.r // 2, alpha=lora.alpha / 2)
    return lora


def at_most(lora: LoRAConfig, rank: int) -> LoRAConfig:
    """Return the adapter with a rank of at most so many, at the same scaling."""
    return replace(lora, r=min(lora.r, rank), alpha=lora.alpha * min(lora.r, rank) / lora.r)


def active(ground: Ground, wanted: LoRAConfig | None = None) -> Offer | None:
    """Return the usual choice for a model: all linear layers of its blocks; for others the next best; None if nothing
    can be adapted.  `wanted` is the adapter in place of the usual one.
    """
    lora = wanted or usual("all-linear")
    layers = (*LINEAR, "convolution")
    but_head = " but the head" if any(one.role == "head" for one in ground.found) else ""
    stages = (
        ("linears", "All linear layers of the blocks and not the head: the usual choice (QLoRA, arXiv:2305.14314).",
         [one for one in ground.usable if one.role in LINEAR and one.in_block]),
        ("convolutions", "All convolutions of the blocks.",
         [one for one in ground.usable if one.role == "convolution" and one.in_block]),
        ("layers", f"All layers{but_head}.", [one for one in ground.usable if one.role in layers]),
        ("weights", "All that can be adapted.", ground.usable),
    )  # fmt: skip
    offered = (ground.choice(name, about, chosen, fitted(chosen, lora)) for name, about, chosen in stages)
    first = next(filter(None, offered), None)
    return None if first is None else replace(first, place="active")


def instead(ground: Ground, taken: Offer) -> Iterator[Offer]:
    """Yield what people take in place of the usual choice, as far as it is something else."""
    qkvo, mlp, linear = (usual(name) for name in ("qkvo", "mlp", "all-linear"))
    attention = [one for one in ground.usable if one.role == "attention"]
    feed_forward = [one for one in ground.usable if one.role in ("MLP", "experts")]
    everywhere = [one for one in ground.usable if one.role in LINEAR]
    linears = _EVERYWHERE if any(one.role in LINEAR for one in taken.sites) else _ALONE
    shared = [one for one in taken.sites if one.role != "experts"]
    shared = shared if len(shared) < len(taken.sites) else []
    offered = (
        _query_and_value(ground, attention),
        ground.choice("attention", "All projections of the attention.", attention, fitted(attention, qkvo)),
        ground.choice("mlp", "The feed-forward layers alone.", feed_forward, fitted(feed_forward, mlp)),
        ground.choice("shared-linears", _SHARED, shared, fitted(shared, linear)),
        ground.choice("all-linears", linears, everywhere, fitted(everywhere, linear)),
    )
    seen = {_extent(taken)}
    of_peft = _default_of_peft(ground)
    extent = None if of_peft is None else _extent(of_peft)
    for choice in filter(None, (*offered, of_peft)):
        if _extent(choice) not in seen:
            seen.add(_extent(choice))
            is_same = _extent(choice) == extent and choice is not of_peft
            more = f"  PEFT has these by default for `{ground.kind}`." if is_same else ""
            yield replace(choice, about=choice.about + more)


def _default_of_peft(ground: Ground) -> Offer | None:
    """Return what PEFT adapts in models of this type; None where it knows nothing of them."""
    chosen = [one for one in ground.usable if any(is_default_of_peft(ground.kind, path) for path in one.site.paths)]
    about = f"What PEFT adapts in models of type `{ground.kind}` where a configuration names nothing."
    return ground.choice("peft-default", about, chosen, DEFAULT_LORA)


def _extent(choice: Offer) -> tuple[object, ...]:
    """Return what tells two choices apart: their sites, and whether parts of them are adapted."""
    return (frozenset(one.site.path for one in choice.sites), *("slices" in rule for rule in choice.rules))


def _query_and_value(ground: Ground, attention: Sequence[Found]) -> Offer | None:
    """Return what the LoRA paper adapts: layers of their own, and parts of fused ones where those are known."""
    own = [one for one in attention if is_adapted_by("attention", one.site)]
    thirds = [one for one in attention if _in_thirds(one)]
    lora = fitted([*own, *thirds], usual("attention"))
    own, thirds = ([one for one in sites if one.narrow >= lora.r] for sites in (own, thirds))
    rules = [ground.rule("query-value", own, lora)] if own else []
    about = "Query and value alone, as in the LoRA paper (arXiv:2106.09685, §7.1)."
    if thirds:
        slices: dict[str, Written] = {"of": ("q", "k", "v"), "adapt": ("q", "v")}
        rules.append(ground.rule("fused-query-value", thirds, lora, slices=slices))
        about += "  Of fused weights the parts: see that the forward cuts them into q, k, v in this order."
    return Offer(about, tuple(rules), (*own, *thirds)) if rules else None


def _in_thirds(one: Found) -> bool:
    out_features, in_features = one.site.features
    names = {path.rpartition(".")[2] for path in one.site.paths}
    return out_features == 3 * in_features and not one.site.is_banked and not names.isdisjoint(IN_THIRDS)


def beside(ground: Ground, taken: Offer) -> Iterator[Offer]:
    """Yield what may be adapted beside the usual choice."""
    has = {one.site.path for one in taken.sites}
    left = [one for one in ground.usable if one.site.path not in has]
    large, small = (at_most(usual(name), rank_of(taken)) for name in ("all-linear", "attention"))
    offered = (
        ("head", "The head.", "head", large),
        ("embeddings", "The embeddings: for new tokens, say.", "embedding", large),
        ("routers", "The routers, which choose the experts: mostly left alone.", "router", small),
        ("other-convolutions", "The convolutions.", "convolution", large),
    )
    for name, about, role, adapter in offered:
        choice = ground.choice(name, about, [one for one in left if one.role == role], adapter)
        if choice is not None:
            yield replace(choice, place="beside")


def trained_whole(ground: Ground, norms: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield (what, globs, number of parameters) of modules that people train whole, and save with the adapter."""
    sizes = {path: size for path, size in ground.inventory.modules if path}
    heads = (one.site for one in ground.found if one.role == "head")
    alone = [site.path for site in heads if not (site.parameter or site.tied_to)]
    for about, paths in (("The norms", norms), ("The head", alone)):
        chosen = [path for path in dict.fromkeys(paths) if path in sizes]
        if chosen:
            taken = set(chosen)
            globs = covering(chosen, [path for path in sizes if path not in taken])
            yield about, globs, sum(sizes[path] for path in chosen)
