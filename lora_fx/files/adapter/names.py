"""Keys and patterns as PEFT spells them."""

import functools
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from lora_fx.errors import AdapterFileError
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import EXPRESSION_PREFIX, NamePattern
from lora_fx.text import dotted

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
METADATA_KEY = "lora_fx"
_SECONDS = 1.0
"""For one name and one pattern of an adapter's configuration."""
Number = TypeVar("Number", int, float)
_FACTOR = re.compile(rf"{re.escape(PREFIX)}((?P<path>.+)\.)?(?P<factor>lora_[AB])\.weight", re.DOTALL)
_EMBEDDING = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<factor>lora_embedding_[AB])", re.DOTALL)
_ROWS = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.token_adapter\.trainable_tokens_delta", re.DOTALL)
_OF_TRAINING = re.compile(r"\.lora_(velora_embed$|monteclora_sampler\.)")
_NESTED = ".base_layer"


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
    return sorted({parts[0] for key in keys if (parts := split_factor_key(key))})


def factor_keys(stem: str, keys: Container[str]) -> tuple[str, str]:
    """Return the keys of both factors of a site in a file with these keys."""
    first, second = factor_names(embedding=factor_key(stem, "lora_embedding_A") in keys)
    return factor_key(stem, first), factor_key(stem, second)


def anchored(path: str) -> str:
    """Return the pattern that PEFT's rank_pattern and alpha_pattern need to mean this path alone."""
    return f"^{re.escape(path)}"


class Pattern(Protocol):
    """What a key of a pattern means."""

    def matches(self, name: str) -> bool: ...


@functools.lru_cache(maxsize=4096)
def pattern_of(key: str) -> Pattern:
    r"""Return what a key of PEFT's rank_pattern or alpha_pattern means: the path, or its end after a dot.

    PEFT asks `re.match(rf"(.*\.)?({key})$", path)`; here it is asked in linear time, since anybody may have written it;
    what cannot be (look-around, back-references) is asked for a limited time.

    Raises:
        PatternError: the key is not an expression, or needs the package `regex`, which transformers brings.
    """
    text = key.removesuffix("$")
    try:
        if "|" in text:
            return NamePattern(rf"{EXPRESSION_PREFIX}(.*\.)?({text})")
        return NamePattern(EXPRESSION_PREFIX + (text[1:] if text.startswith("^") else rf"(.*\.)?({text})"))
    except PatternError as error:
        return _Backtracking.of(rf"(.*\.)?({key})$", error)


@dataclass(frozen=True, slots=True)
class _Backtracking:
    """An expression that cannot be matched in linear time; one that takes long is refused."""

    expression: Any

    @staticmethod
    def of(text: str, unsupported: PatternError) -> "_Backtracking":
        try:
            import regex
        except ImportError:
            raise unsupported from None
        try:
            return _Backtracking(regex.compile(text))
        except regex.error as error:
            raise unsupported from error

    def matches(self, name: str) -> bool:
        try:
            return self.expression.match(name, timeout=_SECONDS) is not None
        except TimeoutError as error:
            text = self.expression.pattern
            raise AdapterFileError(CONFIG_FILE, "has a pattern that takes too long to match", [(text, name)]) from error


def pattern_value(patterns: Mapping[str, Number], path: str, default: Number) -> Number:
    """Return what the patterns say of the path, as PEFT reads them: the first key that fits the path or its end."""
    return next((value for key, value in patterns.items() if pattern_of(key).matches(path)), default)


def full_match(expression: str, name: str, otherwise: bool) -> bool:
    """Whether an expression of anybody's is the whole name; `otherwise` where that cannot be told in linear time."""
    try:
        return NamePattern(EXPRESSION_PREFIX + expression).matches(name)
    except PatternError:
        return otherwise


def module_to_save(tensor: str, names: Sequence[str]) -> str | None:
    """Return the path of the module of PEFT's `modules_to_save` that a tensor belongs to, or None.

    As PEFT does, every module is meant whose path ends with one of the names.
    """
    parts = tensor.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in paths if path.endswith(tuple(names))), None)


def is_end(name: str, path: str) -> bool:
    """Whether a name is a path, or its end after a dot: PEFT means by it every module with such a path."""
    return f".{path}".endswith(f".{name}")


def target_modules(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Return PEFT's `target_modules` for exactly these paths.

    A name in PEFT's list also means every module whose path ends with it; where that would claim another module, an
    anchored expression is returned instead.
    """
    wanted = sorted(paths)
    claimed = {module for module in modules for target in wanted if is_end(target, module)}
    if claimed <= set(wanted):
        return wanted
    return "^(" + "|".join(map(re.escape, wanted)) + ")$"


def only_for_lora_fx(path: str, reason: str) -> str:
    """Return a `target_modules` that no module has, so that PEFT refuses the adapter, and shows why, instead of
    computing something else with it.
    """
    return f"only lora_fx can read this adapter, since at {path} {reason}"
