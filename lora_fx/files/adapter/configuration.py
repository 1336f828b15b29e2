"""adapter_config.json → a checked Configuration."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_fx.errors import AdapterFileError
from lora_fx.files.adapter.names import CONFIG_FILE, ends_of, full_match, has_end
from lora_fx.files.adapter.patterns import Patterns
from lora_fx.files.adapter.settings import OF_BLOCKS, PATTERNS, Fact, table, wrong_patterns, wrong_values
from lora_fx.rules.inits import OF_FILES
from lora_fx.sources.document import read_json
from lora_fx.sources.regular import UnreadableError, is_regular
from lora_fx.text import listing

Names = dict[str, None]
"""A set that keeps its order."""
_ON_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""What is the name of a repository there."""
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which factors have only the blocks of their diagonal in a file (`use_bdlora`)."""

    number: int
    of_A: tuple[str, ...]
    """A layer's A has blocks if one of these is anywhere in its path."""
    of_B: tuple[str, ...]

    def holds(self, path: str, factor: str) -> bool:
        """Whether `lora_A` or `lora_B` of the layer at a path has blocks."""
        texts = {"lora_A": self.of_A, "lora_B": self.of_B}.get(factor, ())
        return self.number > 1 and any(text in path for text in texts)


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a configuration says of an adapter, in PEFT's words."""

    r: int
    lora_alpha: float
    lora_dropout: float
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    use_rslora: bool
    use_dora: bool
    target_modules: str | Names
    """An expression, or names."""
    modules_to_save: tuple[str, ...]
    target_parameters: Names = field(default_factory=dict)
    """Ends of the dotted names of raw parameters."""
    peft_version: str = ""
    base: str = ""
    """`base_model_name_or_path`: where the model came from that it was trained on."""
    fan_in_fan_out: bool = False
    """Whether linears store [in, out]; of the last that PEFT has met."""
    ensure_weight_tying: bool = False
    excluded: str | Names = field(default_factory=dict)
    """`exclude_modules`: an expression, or names."""
    layers: frozenset[int] = frozenset()
    """`layers_to_transform`: the layers that have an adapter; none stands for all."""
    layers_pattern: tuple[str, ...] = ()
    """What stands before the number of a layer; none stands for anything."""
    lora_bias: bool = False
    """Whether lora_B has a bias."""
    init: str = "kaiming"
    """How the first values were made, where they are parts of the weight: PEFT trains on what is left of it."""
    bias: str = "none"
    """Which biases are trained: "none", "lora_only" (of adapted layers) or "all"."""
    token_rows: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    """`trainable_token_indices`: of the one embedding, or by ends of paths."""
    invocation: tuple[int, ...] = ()
    """`alora_invocation_tokens`: from whose last occurrence on it acts; none: on every token."""
    blocks: Blocks | None = None
    kasa: bool = False
    """Whether a diagonal stands between the factors."""

    def rank_at(self, name: str) -> int:
        """Return the rank of a site that patterns call so."""
        return self.rank_pattern.value(name, self.r)

    def claims(self, path: str, match: Callable[[str, str, bool], bool] = full_match) -> bool:
        """Whether PEFT would adapt a layer at that path.

        `match` tells whether an expression is a whole name; the default says no where only a slow one could tell.
        """
        if self._leaves_out(path, match):
            return False
        if isinstance(self.target_modules, str):
            return match(self.target_modules, path, False)
        is_in_layer = not self.layers or self._layer_of(path) in self.layers or path in self.target_modules
        return is_in_layer and has_end(path, self.target_modules)

    def _leaves_out(self, path: str, match: Callable[[str, str, bool], bool]) -> bool:
        if any(f".{name}." in f".{path}." for name in self.modules_to_save):
            return True
        if isinstance(self.excluded, str):
            return match(self.excluded, path, True)
        return has_end(path, self.excluded)

    def _layer_of(self, path: str) -> int | None:
        """Return the number of the layer that a path is in: the first number behind a pattern, or behind two names."""
        names = path.split(".")
        numbers = [at for at, name in enumerate(names[:-1]) if at and name.isdecimal()]
        for pattern in self.layers_pattern:
            for at in numbers:
                if full_match(rf"(.*\.)?{pattern}", ".".join(names[:at]), otherwise=False):
                    return int(names[at])
        return next((int(names[at]) for at in numbers if at > 1), None) if not self.layers_pattern else None

    def rows_at(self, path: str, by_path: bool) -> tuple[int, ...]:
        """Return the rows of an embedding that are trained alone; `by_path`: not by the end of a path too."""
        if isinstance(self.token_rows, tuple):
            return self.token_rows
        if by_path:
            return self.token_rows.get(path, ())
        fitting = {*ends_of(path)} & self.token_rows.keys()
        return next((self.token_rows[name] for name in self.token_rows if name in fitting), ()) if fitting else ()

    def alpha_at(self, name: str) -> float:
        """Return the alpha of a site that patterns call so."""
        return self.alpha_pattern.value(name, self.lora_alpha)


def read_configuration(path: Path) -> Configuration:
    """Return the configuration that a file holds.

    Raises:
        AdapterFileError: it is missing, not JSON, of another kind, holds values of wrong types, or asks for what would
            be silently wrong if it were read as plain LoRA.
    """
    return configuration_of(read_json_of(path), str(path))


def configuration_of(config: Mapping[str, Any], source: str) -> Configuration:
    """Return what a mapping says of an adapter, in PEFT's words; `source` is what errors call it.

    Raises:
        AdapterFileError: as `read_configuration`.
    """
    if config.get("peft_type") != "LORA":
        raise _not_lora(source, config.get("peft_type"))
    ranks, alphas = (Patterns[Any](table(config.get(key))) for key in PATTERNS)
    wrong = [*wrong_values(config), *wrong_patterns(config, ranks, alphas)]
    if wrong:
        raise AdapterFileError(source, "holds what no configuration can hold", wrong)
    refused = list(_refused(config))
    if refused:
        raise AdapterFileError(source, "asks for what lora_fx does not read", refused)
    return _configuration(config, ranks, alphas)


def read_json_of(path: Path) -> dict[str, Any]:
    """Return what the JSON of a configuration holds, not yet checked; AdapterFileError if there is none."""
    _must_exist(path)
    try:
        config = read_json(path, _MOST_BYTES)
    except UnreadableError as error:
        raise AdapterFileError(str(path), str(error), advice="it may be cut off") from error
    if not isinstance(config, dict):
        raise _not_lora(str(path), type(config).__name__)
    return config


def _not_lora(source: str, kind: object) -> AdapterFileError:
    facts = [("peft_type", f"{kind!r:.60}")]
    return AdapterFileError(source, "is not the configuration of a LoRA adapter", facts)


def _must_exist(path: Path) -> None:
    try:
        path.lstat()
    except (OSError, ValueError):
        inside = _folders_with_one(path.parent)
        advice = f"these folders in it hold one: {listing(inside)}" if inside else "give the directory of an adapter"
        if _ON_HUB.fullmatch(str(path.parent)) and not path.parent.exists():
            advice += f'; huggingface_hub.snapshot_download("{path.parent}") returns that of one on the hub'
        raise AdapterFileError(f"{path!s:.300}", "does not exist", advice=advice) from None


def _folders_with_one(folder: Path) -> list[str]:
    try:
        return sorted(child.name for child in folder.iterdir() if is_regular(child / CONFIG_FILE))
    except (OSError, ValueError):
        return []


# -- meaning

_ON_RESIDUAL = ("pissa", "olora")
"""What is left of the base is found again from the base itself, as PEFT finds it when it loads such a file."""
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_KNOWN = frozenset(
    {"alora_invocation_tokens", "alpha_pattern", "auto_mapping",
     "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
     "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "kasa_config",
     "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout",
     "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type",
     "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
     "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_rslora",
     "velora_config"}
)  # fmt: skip
"""Settings of PEFT (0.21) that change nothing of what a file's tensors mean, or that are read.

MiCA, VeLoRA and MonteCLoRA train A and B in another way, and compute with them as everybody does.
"""
_REFUSED_SETTINGS = {
    "layer_replication": "layer replication: the model has other layers",
    "use_qalora": "QALoRA: lora_A takes its inputs in groups",
    "arrow_config": "Arrow: a router chooses between adapters",
}


_ON_EVERY_TOKEN = (
    ("use_dora", "DoRA"),
    ("lora_bias", "a bias of lora_B"),
    ("bias", "acts on every token"),
    ("modules_to_save", "acts on every token"),
    ("trainable_token_indices", "acts on every token"),
)
"""What an adapter that acts from an invocation on cannot have."""


_VARIANTS = {"use_bdlora": "BD-LoRA", "kasa_config": "KaSA"}


def _refused(config: Mapping[str, Any]) -> Iterator[Fact]:
    for key, name in _REFUSED_SETTINGS.items():
        if config.get(key):
            yield key, name
    for key, value in config.items():
        if value is True and key not in _KNOWN and key not in _REFUSED_SETTINGS:
            yield f"{key:.80}", "is true, and not known to this lora_fx: what it changes would be lost"
    for key, words in _ON_EVERY_TOKEN if config.get("alora_invocation_tokens") else ():
        if config.get(key) and config[key] != "none":
            yield key, f"{words}, beside alora_invocation_tokens"
    for key, name in _VARIANTS.items():
        others = [other for other in (*_VARIANTS, "use_dora") if other != key and config.get(other)]
        if config.get(key) and others:
            yield key, f"{name} beside {listing(others)}, which PEFT has not either"
    init = _init_of(config)
    if config.get("kasa_config") and init in _ON_RESIDUAL:
        yield "kasa_config", f"KaSA beside {init}: each takes other parts of the base away"
    if init not in (*_HARMLESS_INITS, *_ON_RESIDUAL):
        why = "drawn anew at each load" if str(init).startswith("pissa_niter_") else "made from more than its weights"
        yield (
            "init_lora_weights",
            f"{init!r:.60}: it was trained on what is left of the base after taking away parts, {why}; convert it "
            "with PEFT's path_initial_model_for_weight_conversion, or, if the model is that rest, put true there",
        )


def _configuration(config: Mapping[str, Any], ranks: Patterns[int], alphas: Patterns[float]) -> Configuration:
    layers = config.get("layers_to_transform")
    pattern = config.get("layers_pattern") or ()
    return Configuration(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        lora_dropout=config.get("lora_dropout") or 0.0,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        target_modules=_targets(config.get("target_modules")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        target_parameters=dict.fromkeys(config.get("target_parameters") or ()),
        peft_version=config.get("peft_version") or "",
        base=config.get("base_model_name_or_path") or "",
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        excluded=_targets(config.get("exclude_modules")),
        layers=frozenset([layers] if isinstance(layers, int) else layers or ()),
        layers_pattern=(pattern,) if isinstance(pattern, str) else tuple(pattern),
        lora_bias=bool(config.get("lora_bias")),
        init=_residual_of(config),
        kasa=bool(config.get("kasa_config")),
        bias=config.get("bias") or "none",
        token_rows=_token_rows(config.get("trainable_token_indices") or ()),
        invocation=tuple(config.get("alora_invocation_tokens") or ()),
        blocks=_blocks(config.get("use_bdlora")),
    )


def _blocks(value: Any) -> Blocks | None:
    return Blocks(value.get("nblocks", 1), *(tuple(value.get(key) or ()) for key in OF_BLOCKS)) if value else None


def _residual_of(config: Mapping[str, Any]) -> str:
    """Return which parts of the weight are taken away; "kaiming" for none."""
    init = "kasa" if config.get("kasa_config") else _init_of(config)
    return str(init) if init in (*_ON_RESIDUAL, *OF_FILES) else "kaiming"


def _init_of(config: Mapping[str, Any]) -> object:
    """Return `init_lora_weights`, in small letters as PEFT takes it; the default where it is not given."""
    init = config.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else init


def _targets(value: Any) -> str | Names:
    return value if isinstance(value, str) and value else dict.fromkeys(value or ())


def _token_rows(rows: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    return {name: tuple(indices or ()) for name, indices in rows.items()} if isinstance(rows, dict) else tuple(rows)
