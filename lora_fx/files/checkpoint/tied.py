"""Heads that share the embedding's weight: adapting one must not change the other, nor be lost when they are loaded."""

import copy
import re
from collections.abc import Collection, Iterator
from typing import Any

from lora_fx.files.checkpoint.basefiles import BaseCheckpoint, sections_of
from lora_fx.files.safetensors import RawFile, RawTensor

_FLAG = "tie_word_embeddings"
_WITH_HEAD = re.compile(r"LMHead|CausalLM|ConditionalGeneration|MaskedLM|PreTraining")
_FORWARD_ASKS = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Models whose forward scales by whether the two are tied."""


def may_be_tied(base: BaseCheckpoint) -> bool:
    """Whether a loader may tie head and embedding: config.json says so, or says nothing, which means yes for many."""
    flags = [section[_FLAG] for section in base.sections if _FLAG in section]
    return base.config is not None and (not flags or any(flags))


def shared_weight(base: BaseCheckpoint, shape: tuple[int, ...]) -> tuple[RawFile, RawTensor] | str:
    """Return the embedding that a head of this shape shares its weight with, or why there is none."""
    if not may_be_tied(base):
        says = f"{_FLAG} is false" if base.config is not None else "there is no config.json to say that it is tied"
        return f"is not there, and {says}"
    fitting = base.token_shapes.get(shape, [])
    if len(fitting) == 1:
        return fitting[0]
    return f"is not there, and {base.token_names or 'no embedding'} could be tied to it"


def refusals(base: BaseCheckpoint, changed: Collection[str], ensured: bool) -> Iterator[tuple[str, str]]:
    """Yield (key, reason) for changes that the other tied weight would follow, or that untying would spoil.

    Args:
        changed: keys of the token weights that get other values, or are added.
        ensured: whether an adapter says that it was trained with both tied.
    """
    if not may_be_tied(base):
        return
    kind, stored = (base.config or {}).get("model_type"), base.token_weights
    if needs_untying(base, changed):
        if kind in _FORWARD_ASKS:
            for key in sorted(changed):
                yield key, f"{kind} computes something else when {_FLAG} is false"
    elif not ensured and _has_head(base):
        for key in changed:
            if key in stored:
                yield key, f"the head shares it ({_FLAG}) and must not change; load the model and use lora_fx.merge"


def needs_untying(base: BaseCheckpoint, changed: Collection[str]) -> bool:
    """Whether loading would tie token weights that differ after a merge: one is added, or another one is stored."""
    stored = base.token_weights
    return may_be_tied(base) and bool(changed) and len({*stored, *changed}) > 1


def _has_head(base: BaseCheckpoint) -> bool:
    names = (base.config or {}).get("architectures") or ["LMHead"]
    return not isinstance(names, list) or any(_WITH_HEAD.search(str(name)) for name in names)


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with head and embedding apart; nothing else changes."""
    config = copy.deepcopy(config)
    holders = [section for section in sections_of(config) if _FLAG in section]
    for section in holders or [config]:
        section[_FLAG] = False
    return config
