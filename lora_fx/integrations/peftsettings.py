"""A configuration of PEFT's, in whatever form it is at hand → its settings, checked."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_fx.errors import Problem, RefusedError, RuleError
from lora_fx.files.adapter.configuration import Configuration, configuration_of, read_json_of
from lora_fx.files.adapter.names import CONFIG_FILE, HEADS_OF_TASKS
from lora_fx.integrations.pefttargets import EMBEDDINGS, FUSED_IN_EXPERTS
from lora_fx.models.layers import raw_kinds
from lora_fx.rules.inits import FROM_DATA, INITS, is_init

Settings = dict[str, Any]
_INITS: dict[object, str] = {True: "kaiming", None: "kaiming", False: "random"}
_NO_RULE = {
    "velora_config": "VeLoRA: it keeps less for the backward pass, in another way",
    "monteclora_config": "MonteCLoRA: it samples factors while it trains",
    "lora_bias": "a bias of lora_B",
    "kasa_config": "KaSA: it trains a diagonal between the factors",
    "use_bdlora": "BD-LoRA: it trains only the blocks of the diagonal of a factor",
}
"""What changes how a new adapter is trained, and no rule says."""


def settings_of(config: object) -> tuple[Settings, str]:
    """Return the settings of a LoraConfig, of a mapping, or of an adapter's directory or file, and what errors call it.

    Raises:
        RuleError: it is none of these.
        AdapterFileError: there is no such file, or it is no JSON.
    """
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        file = path / CONFIG_FILE if path.is_dir() else path
        return _settings(read_json_of(file)), str(file)
    is_of_peft = any(kind.__name__ == "PeftConfigMixin" for kind in type(config).__mro__)
    given = config.to_dict() if is_of_peft else config  # type: ignore[attr-defined]
    if not isinstance(given, Mapping):
        what = f"a configuration must be a peft.LoraConfig, a dict or a path, not {type(config).__name__}"
        raise RuleError("config", [Problem(what)])
    return _settings({"peft_type": "LORA", **given}), type(config).__name__


def _settings(given: Mapping[str, Any]) -> Settings:
    """Return settings as JSON has them, with sets of names in their order: PEFT's own changes from run to run."""
    settings = {key: _plain(value) for key, value in given.items()}
    named = {key: value for key in _SETS if isinstance(value := settings.get(key), list)}
    return settings | {key: sorted(names, key=str) for key, names in named.items()}


_SETS = ("target_modules", "exclude_modules", "target_parameters")


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def for_model(settings: Settings, model: nn.Module) -> Settings:
    """Return the settings as PEFT changes them for a model that holds in banks what older versions held in linears.

    Raises:
        RefusedError: PEFT would change them, and is not installed.
    """
    if not any(kind.op == "experts" for module in model.modules() for kind in raw_kinds(module).values()):
        return settings
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        _refuse_old_names(settings)
        return settings
    config = LoraConfig(**{key: value for key, value in settings.items() if key in LoraConfig.__dataclass_fields__})
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError as error:
        raise RefusedError("PEFT refuses this configuration for this model", advice=str(error)) from error
    changed = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    return settings | {key: _plain(getattr(config, key)) for key in changed}


def _refuse_old_names(settings: Settings) -> None:
    targets = settings.get("target_modules")
    names = FUSED_IN_EXPERTS if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets or ()}
    if old := sorted(FUSED_IN_EXPERTS & names):
        raise RefusedError(
            "PEFT changes a configuration that names linears of experts, which this model holds in banks",
            [(name, "may be in a bank") for name in old],
            "install peft, or write target_parameters",
        )


def checked(settings: Settings, source: str) -> Configuration:
    """Return the settings as a Configuration with the heads of its task.

    Raises:
        AdapterFileError: values of wrong types, or methods that are not plain LoRA.
        RefusedError: what no rule can say, all of it.
    """
    heads = HEADS_OF_TASKS.get(str(getattr(settings.get("task_type"), "value", settings.get("task_type"))), ())
    saved = [*dict.fromkeys([*(settings.get("modules_to_save") or ()), *heads])]
    config = configuration_of(settings | {"modules_to_save": saved, "init_lora_weights": True}, source)
    refused = list(_refused(settings))
    if refused:
        raise RefusedError("the configuration asks for what no rule can say", refused)
    return config


def _refused(settings: Settings) -> Iterator[tuple[str, str]]:
    yield from ((key, words) for key, words in _NO_RULE.items() if settings.get(key))
    init = settings.get("init_lora_weights", True)
    if init not in _INITS and (not is_init(init) or init in FROM_DATA):
        yield "init_lora_weights", f"{init!r:.60}: first values that are not here"
    targets = settings.get("target_modules")
    names = [] if isinstance(targets, str) else [name for name in targets or () if name.split(".")[-1] in EMBEDDINGS]
    if settings.get("ensure_weight_tying") and names:
        yield "ensure_weight_tying", f"one adapter for {' and '.join(names)} and what is tied to it"


def lora_of(config: Configuration, settings: Settings) -> Settings:
    """Return what rules have under `defaults`: r, alpha, and what is not as by default."""
    init = settings.get("init_lora_weights", True)
    values = {
        "r": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout or None,
        "rslora": config.use_rslora or None,
        "dora": config.use_dora or None,
        "invocation": list(config.invocation) or None,
        "bias": settings.get("bias") == "lora_only" or None,
        "init": _INITS.get(init, init) if init in _INITS else init,
    }
    return {key: value for key, value in values.items() if value is not None and (key, value) != ("init", INITS[0])}
