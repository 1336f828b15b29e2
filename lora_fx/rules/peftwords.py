"""What PEFT calls otherwise: a keyword of its `LoraConfig`, given to a function of ours, is answered by name."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from lora_fx.text import columns

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_THERE_IS_NONE = "there is no counterpart"
_NOT_NEEDED = "not needed"
_IN_RULES = {
    "lora_alpha": "alpha=…; without it alpha is 2 · r, and 16 in rules",
    "target_modules": 'target=[…], as target="all-linear"',
    "exclude_modules": "in the rules: one with `skip:` before the others",
    "lora_dropout": "in the rules: `dropout`",
    "bias": "in the rules: `bias: lora_only` or `bias: all` at the top, or `bias: true` in one",
    "use_rslora": "in the rules: `rslora: true`",
    "use_dora": "in the rules: `dora: true`",
    "modules_to_save": 'in the rules: `train: ["classifier"]`',
    "init_lora_weights": "in the rules: `init`",
    "layers_to_transform": 'in the rules: a range in a name, `"**.layers.{0..3}.**.q_proj"`',
    "layers_pattern": "in the rules: a name says it",
    "rank_pattern": "in the rules: one for each rank",
    "alpha_pattern": "in the rules: one for each alpha",
    "target_parameters": "target=[…]: raw parameters and banks of experts go by their names",
    "ensure_weight_tying": "in the rules: `train:` names both; `tokens:` keeps ties",
    "trainable_token_indices": 'in the rules: `tokens: [{name: "**.embed_tokens", ids: […]}]`',
    "lora_bias": "in the rules: `bias: true` trains the layer's own, which adds the same",
    "alora_invocation_tokens": "in the rules: `invocation`",
    "corda_config": "in the rules: `init: corda`, by lora_fx.plan_from_data",
    "eva_config": "in the rules: `init: eva`, by lora_fx.plan_from_data",
    "lora_ga_config": "in the rules: `init: lora_ga`, by lora_fx.plan_from_data",
    "loftq_config": "in the rules: `init: loftq`, by lora_fx.plan_from_data",
    "inference_mode": "not needed: tuned.eval(), and requires_grad_(False) freezes",
    "task_type": "not needed: the result has the model's own class and methods",
    "peft_type": "not needed: LoRA is all there is",
    "fan_in_fan_out": "not needed: it is seen which way round a weight is stored",
}
_UNNEEDED = (
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config", "mixed",
    "autocast_adapter_dtype", "low_cpu_mem_usage",
)  # fmt: skip
_LACKING = (
    "layer_replication", "velora_config", "monteclora_config", "kasa_config", "arrow_config", "use_bdlora",
    "use_qalora", "qalora_group_size", "megatron_config", "megatron_core",
)  # fmt: skip
_CONFIG = "lora_fx.rules_from_peft(config) in the place of rules"
_OF_CALLS = {
    "peft_config": _CONFIG,
    "config": _CONFIG,
    "adapter_name": 'in the rules: `adapter`; or lora_fx.rename(tuned, "default", name)',
}
_IN_FILES = "the adapter's files say it"
WORDS: Mapping[str, Mapping[str, str]] = {
    "": _IN_RULES | dict.fromkeys(_UNNEEDED, _NOT_NEEDED) | dict.fromkeys(_LACKING, _THERE_IS_NONE) | _OF_CALLS,
    "add": {"adapter_name": "adapter=…", "is_trainable": "trainable=…", "model_id": "the directory, as the source"},
    "load": {
        **dict.fromkeys((*_IN_RULES, "r", "alpha", "target", "rules", "config", "peft_config"), _IN_FILES),
        "adapter_name": 'lora_fx.rename(tuned, "default", name)',
        "model_id": "the directory",
        "is_trainable": "not needed: what is loaded is trained; requires_grad_(False) freezes",
    },
}
"""By the name of a function ("" for all), what stands for a keyword of PEFT there."""


def answering_peft(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Return the function itself, which for keywords of PEFT that it does not take tells what does the same here."""
    known = inspect.signature(function).parameters.keys()
    words = {**WORDS[""], **WORDS.get(function.__name__, {})}

    @functools.wraps(function)
    def answering(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not known >= kwargs.keys() and (asked := [name for name in kwargs if name not in known and name in words]):
            raise TypeError(_answer(function.__name__, {name: words[name] for name in asked}))
        return function(*args, **kwargs)

    return answering


def _answer(function: str, words: Mapping[str, str]) -> str:
    end = "lora_fx.rules_from_peft(config) makes rules of a whole LoraConfig"
    return "\n".join([f"{function}() does not take what PEFT calls", columns(list(words.items())), end])
