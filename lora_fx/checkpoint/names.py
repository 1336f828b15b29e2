"""Keys and patterns as PEFT spells them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
METADATA_KEY = "lora_fx"
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<factor>lora_[AB])\.weight")


def factor_key(path: str, factor: str) -> str:
    """Return the key of `lora_A` or `lora_B` at a site."""
    return f"{PREFIX}{path}.{factor}.weight"


def magnitude_key(path: str) -> str:
    """Return the key of DoRA's lengths at a site."""
    return f"{PREFIX}{path}.lora_magnitude_vector"


def bias_key(path: str) -> str:
    """Return the key of a site's own bias, trained with the adapter."""
    return f"{PREFIX}{path}.base_layer.bias"


def split_factor_key(key: str) -> tuple[str, str] | None:
    """Return (path, "lora_A" or "lora_B") of a factor's key, else None."""
    match = _FACTOR.fullmatch(key)
    return None if match is None else (match["path"], match["factor"])


def anchored(path: str) -> str:
    """Return the pattern that PEFT's rank_pattern and alpha_pattern need to mean this path alone."""
    return f"^{re.escape(path)}"


def pattern_value(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Return what the patterns say of the path, as PEFT reads them: the first key that fits the path or its end."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def target_modules(paths: Iterable[str], modules: Iterable[str]) -> list[str] | str:
    """Return PEFT's `target_modules` for exactly these paths.

    A name in PEFT's list also means every module whose path ends with it; where that would claim another module, an
    anchored expression is returned instead.
    """
    wanted = sorted(paths)
    claimed = {m for m in modules for target in wanted if m == target or m.endswith(f".{target}")}
    if claimed <= set(wanted):
        return wanted
    return "^(" + "|".join(map(re.escape, wanted)) + ")$"
