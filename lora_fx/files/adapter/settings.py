"""What each setting of an adapter_config.json can be: somebody else may have written it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_fx.files.adapter.patterns import Patterns
from lora_fx.rules import given
from lora_fx.rules.keys import BIASES

Fact = tuple[str, str]
_MOST_WHOLE, _LARGEST = 2**31 - 1, 3.4028234663852886e38
"""What counts and ranks can be, and float32's largest: PEFT and the models compute in it."""
_MOST_NAMES, _MOST_LAYER_NAMES = 256, 16
"""Of what is compared with the name of every tensor, and of what is an expression."""


def is_whole(value: object, least: int = 1) -> bool:
    """Whether it is an integer, not below the least and of 31 bits at most."""
    return given.is_whole(value, least, _MOST_WHOLE)


def is_number(value: object) -> bool:
    """Whether it is a number that is finite in float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_share(value: Any) -> bool:
    """Whether it is a number of at least 0 and below 1."""
    return is_number(value) and 0 <= value < 1


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _are_few_names(value: object) -> bool:
    return _are_names(value) and len(value) <= _MOST_NAMES  # type: ignore[arg-type]


def _are_layer_names(value: object) -> bool:
    return isinstance(value, str) or (_are_names(value) and len(value) <= _MOST_LAYER_NAMES)  # type: ignore[arg-type]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_targets(value: object) -> bool:
    return isinstance(value, str) or _are_names(value)


def _are_rows(value: object) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return len(lists) <= _MOST_NAMES and all(
        rows is None or (isinstance(rows, list) and all(is_whole(row, 0) for row in rows)) for rows in lists
    )


def _is_bias(value: object) -> bool:
    return value in BIASES


def _are_tokens(value: object) -> bool:
    return isinstance(value, list) and all(is_whole(token, 0) for token in value)


def _are_blocks(value: Any) -> bool:
    """Whether it is a table of PEFT's BdLoraConfig, which knows no other keys."""
    if value is False or not isinstance(value, dict) or not value.keys() <= {*OF_BLOCKS, "nblocks", "match_strict"}:
        return value is False
    names = all(value.get(key) is None or _are_few_names(value[key]) for key in OF_BLOCKS)
    return names and is_whole(value.get("nblocks", 1)) and _is_switch(value.get("match_strict", True))


def _are_layers(value: object) -> bool:
    return all(is_whole(number, 0) for number in (value if isinstance(value, list) else [value]))


OF_BLOCKS = ("target_modules_bd_a", "target_modules_bd_b")
"""Keys of `use_bdlora` for the layers whose A, or B, has blocks."""
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "r": (is_whole, "an integer above 0"),
    "lora_alpha": (is_number, "a number that is finite in float32"),
    "lora_dropout": (is_share, "a number, at least 0 and below 1"),
    "use_rslora": (_is_switch, "true or false"),
    "use_dora": (_is_switch, "true or false"),
    "target_modules": (_are_targets, "a string or a list of strings"),
    "modules_to_save": (_are_few_names, "a list of strings"),
    "target_parameters": (_are_names, "a list of strings"),
    "exclude_modules": (_are_targets, "a string or a list of strings"),
    "layers_to_transform": (_are_layers, "an integer or a list of integers"),
    "layers_pattern": (_are_layer_names, "a string or a list of strings"),
    "lora_bias": (_is_switch, "true or false"),
    "bias": (_is_bias, f"one of {', '.join(BIASES)}"),
    "trainable_token_indices": (_are_rows, "a list of integers, or one for each embedding"),
    "alora_invocation_tokens": (_are_tokens, "a list of integers"),
    "use_bdlora": (_are_blocks, "a table with two lists of names, nblocks and match_strict"),
    "peft_version": (_is_text, "a string"),
    "base_model_name_or_path": (_is_text, "a string"),
}
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
"""Each with the setting that it overrides, which must be given; of others null says as much as nothing."""


def wrong_values(config: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield (setting, why) for each value of a type that it cannot have."""
    for key, (fits, words) in _KINDS.items():
        is_left_out = config.get(key) is None and (key not in config or key not in PATTERNS.values())
        if not is_left_out and not fits(config[key]):
            yield key, f"must be {words}, found {config[key]!r:.60}"


def table(value: object) -> dict[str, Any]:
    """Return a mapping itself; of anything else an empty one."""
    return value if isinstance(value, dict) else {}


def wrong_patterns(config: Mapping[str, Any], *tables: Patterns[Any]) -> Iterator[Fact]:
    """Yield (entry, why) for each entry of the tables of `PATTERNS`, in their order, that cannot be."""
    for (key, setting), patterns in zip(PATTERNS.items(), tables, strict=True):
        fits, words = _KINDS[setting]
        if not isinstance(config.get(key), (dict, type(None))):
            yield key, f"must be a mapping, found {config[key]!r:.60}"
        for pattern, value in table(config.get(key)).items():
            if not fits(value):
                yield f"{key} {pattern:.80}", f"must be {words}, found {value!r:.60}"
            if pattern in patterns.problems:
                yield f"{key} {pattern:.80}", patterns.problems[pattern]
