"""Keys and patterns as PEFT spells them."""

import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import EXPRESSION_PREFIX, NamePattern
from lora_fx.text import dotted

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
METADATA_KEY = "lora_fx"
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What a task adds to `modules_to_save`: ends of names (PEFT 0.21, `peft/peft_model.py`)."""
_LONGEST_EXPRESSION = 10_000
_FACTOR = re.compile(rf"{re.escape(PREFIX)}((?P<path>.+)\.)?(?P<factor>lora_[AB])\.weight", re.DOTALL)
_EMBEDDING = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<factor>lora_embedding_[AB])", re.DOTALL)
_ROWS = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)
_OF_TRAINING = re.compile(r"\.lora_(velora_embed$|monteclora_sampler\.)")
_NESTED = ".base_layer"
_LAYERS_OF_PEFT = ("base_layer", "token_adapter")


def factor_key(path: str, factor: str) -> str:
    """Return the key of `lora_A` or `lora_B` at a site; an embedding's `lora_embedding_A` has no `.weight`."""
    return f"{PREFIX}{dotted(path, factor)}{'' if 'embedding' in factor else '.weight'}"


def factor_names(embedding: bool) -> tuple[str, str]:
    """Return the names of the two factors in a file."""
    return ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")


def parameter_stem(owner: str, position: int, number: int) -> str:
    """Return what stands for one of `number` adapted raw parameters of a module, in order of registration, in a key.

    PEFT nests a layer for each: the first parameter is the innermost.
    """
    return owner + _NESTED * (number - 1 - position)


def owner_of(stem: str) -> str:
    """Return the path of the module of a stem that `parameter_stem` made."""
    while stem.endswith(_NESTED):
        stem = stem.removesuffix(_NESTED)
    return stem


def is_of_attention(stem: str) -> bool:
    """Whether a stem is as PEFT writes that of an attention's out_proj."""
    return pattern_name(stem) != stem


def pattern_name(stem: str) -> str:
    """Return what PEFT's rank_pattern and alpha_pattern call the layer of a stem: an attention's are its out_proj's."""
    return stem.removesuffix(f"{_NESTED}.out_proj")


def call_stem(path: str, call: int) -> str:
    """Return what stands for one call's adapter in a key; PEFT knows no such thing, and finds no such module."""
    return f"{path}.call_{call}"


def magnitude_key(path: str) -> str:
    """Return the key of DoRA's lengths at a site."""
    return f"{PREFIX}{path}.lora_magnitude_vector"


def added_bias_key(path: str) -> str:
    """Return the key of what PEFT's lora_B adds to a layer's bias."""
    return f"{PREFIX}{path}.lora_B.bias"


def split_rows_key(key: str) -> str | None:
    """Return the path of the embedding of which a tensor holds rows that are trained alone, else None."""
    match = _ROWS.fullmatch(key)
    return None if match is None else match["path"]


def rows_key(path: str) -> str:
    """Return the key of the rows of an embedding that are trained alone."""
    return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def other_bias_key(name: str, layers: Mapping[str, int]) -> str:
    """Return the key of a bias that belongs to no adapted site, as PEFT's `bias="all"` saves it.

    Args:
        name: of the parameter.
        layers: how many layers PEFT puts around modules, by their paths.
    """
    *path, last = name.split(".")
    words = [f"{part}{_NESTED * layers.get('.'.join(path[: at + 1]), 0)}" for at, part in enumerate(path)]
    return PREFIX + ".".join([*words, last])


def split_bias_key(key: str) -> str | None:
    """Return the name of the parameter whose values a key holds under `bias="all"`; None for any other key."""
    if not key.startswith(PREFIX) or key.rpartition(".")[2] != "bias" or "lora_" in key:
        return None
    words = key.removeprefix(PREFIX).split(".")
    return ".".join(word for word in words if word not in _LAYERS_OF_PEFT)


def is_copied_bias(key: str) -> bool:
    """Whether a bias is there once more: PEFT's `bias="all"` saves those of `modules_to_save`, and of the base, too."""
    return key.endswith((".original_module.bias", ".modules_to_save.bias"))


def is_of_training(key: str) -> bool:
    """Whether a tensor is what VeLoRA and MonteCLoRA keep for training: outputs do not depend on it."""
    return _OF_TRAINING.search(key) is not None


def bias_key(path: str) -> str:
    """Return the key of a site's own bias, trained with the adapter."""
    return f"{PREFIX}{path}.base_layer.bias"


def base_key(path: str) -> str:
    """Return the key of a base weight: PEFT writes those of embeddings and heads along, untrained."""
    return f"{PREFIX}{path}.base_layer.weight"


def split_factor_key(key: str) -> tuple[str, str] | None:
    """Return (path, "lora_A" or "lora_B", or an embedding's) of a factor's key, else None."""
    match = _FACTOR.fullmatch(key) or _EMBEDDING.fullmatch(key)
    return None if match is None else (match["path"] or "", match["factor"])


def stems_in(keys: Iterable[str]) -> list[str]:
    """Return what stands for the sites in the keys of a file."""
    found = [_FACTOR.fullmatch(key) or _EMBEDDING.fullmatch(key) for key in keys if ".lora_" in key]
    return sorted({match["path"] or "" for match in found if match is not None})


class SiteKeys(NamedTuple):
    """The keys of what a file may hold of one site, but for its own bias."""

    A: str
    B: str
    magnitude: str
    added_bias: str
    base: str
    embedding: bool


def site_keys(stem: str, keys: Container[str]) -> SiteKeys:
    """Return the keys of a site's tensors in a file with these keys."""
    begin = f"{PREFIX}{stem}." if stem else PREFIX
    embedding = f"{begin}lora_embedding_A" in keys
    first, second = (
        (f"{begin}lora_embedding_A", f"{begin}lora_embedding_B")
        if embedding
        else (f"{begin}lora_A.weight", f"{begin}lora_B.weight")
    )
    return SiteKeys(first, second, magnitude_key(stem), added_bias_key(stem), base_key(stem), embedding)


def factor_keys(stem: str, keys: Container[str]) -> tuple[str, str]:
    """Return the keys of both factors of a site in a file with these keys."""
    first, second = factor_names(embedding=factor_key(stem, "lora_embedding_A") in keys)
    return factor_key(stem, first), factor_key(stem, second)


def anchored(path: str) -> str:
    """Return the pattern that PEFT's rank_pattern and alpha_pattern need to mean this path alone."""
    return f"^{re.escape(path)}"


def full_match(expression: str, name: str, otherwise: bool) -> bool:
    """Whether an expression of anybody's is the whole name; `otherwise` where that cannot be told in linear time."""
    try:
        if len(expression) <= _LONGEST_EXPRESSION:
            return NamePattern(EXPRESSION_PREFIX + expression).matches(name)
    except PatternError:
        pass
    return otherwise


def module_to_save(tensor: str, names: Sequence[str]) -> str | None:
    """Return the path of the module of PEFT's `modules_to_save` that a tensor belongs to, or None.

    As PEFT does, every module is meant whose path ends with one of the names.
    """
    ends = (at + len(name) for name in names if (at := tensor.find(f"{name}.")) >= 0)
    end = min(ends, default=None)
    return None if end is None else tensor[:end]


def ends_of(path: str) -> Iterator[str]:
    """Yield a path, and its ends after each of its dots: PEFT's names mean every module whose path has such an end."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def begins_in(path: str, owners: Collection[str]) -> bool:
    """Whether a path is that of something inside of one of the owners, which should be a set."""
    at = path.find(".")
    while at >= 0:
        if path[:at] in owners:
            return True
        at = path.find(".", at + 1)
    return False


def has_end(path: str, names: Collection[str]) -> bool:
    """Whether one of the names, which should be a set, is the path, or its end after a dot."""
    return any(end in names for end in ends_of(path))


def target_modules(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Return PEFT's `target_modules` for exactly these paths.

    A name in PEFT's list also means every module whose path ends with it; where that would claim another module, an
    anchored expression is returned instead.
    """
    wanted = sorted(paths)
    names = set(wanted)
    if all(module in names or not has_end(module, names) for module in modules):
        return wanted
    return "^(" + "|".join(map(re.escape, wanted)) + ")$"


def only_for_lora_fx(path: str, reason: str) -> str:
    """Return a `target_modules` that no module has, so that PEFT refuses the adapter, and shows why, instead of
    computing something else with it.
    """
    return f"only lora_fx can read this adapter, since at {path} {reason}"
