"""What PEFT calls otherwise, and what rules say: a keyword or a name that is not here is answered by what is.

Keywords of PEFT's `LoraConfig`, and keys of rules, given to a function of ours; PEFT's functions and methods, looked
for in `lora_fx`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from lora_fx.rules.keys import LORA, RULE, TOP
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
_WHERE_BASE_IS = "not needed: the adapter goes where the base is"
_OF_RULES = {
    **{name: f"in the rules: `{name}` at the top" for name in TOP.keys},
    **{name: f"in the rules: `{name}` of one of them" for name in RULE.keys},
    **{name: f"in the rules: `lora: {{{key.example}}}`" for name, key in LORA.keys.items()},
}
"""Keys of rules, which no function takes as keywords."""
_OF_PEFT = _IN_RULES | dict.fromkeys(_UNNEEDED, _NOT_NEEDED) | dict.fromkeys(_LACKING, _THERE_IS_NONE) | _OF_CALLS
WORDS: Mapping[str, Mapping[str, str]] = {
    "": _OF_RULES | _OF_PEFT,
    "add": {"adapter_name": "adapter=…", "is_trainable": "trainable=…", "model_id": "the directory, as the source"},
    "load": {
        **dict.fromkeys((*_OF_RULES, *_IN_RULES, "r", "alpha", "target", "rules", "config", "peft_config"), _IN_FILES),
        "adapter_name": 'lora_fx.rename(tuned, "default", name)',
        "model_id": "the directory",
        "adapter": "all are loaded, and lora_fx.use(tuned, name) chooses; the directory of one alone has its name",
        **dict.fromkeys(("device_map", "torch_device"), _WHERE_BASE_IS),
        "is_trainable": "not needed: what is loaded is trained; requires_grad_(False) freezes",
    },
}
"""By the name of a function ("" for all), what stands for a keyword there that it does not take."""
NAMES: Mapping[str, str] = {
    "LoraConfig": "lora_fx.apply(model, r=8, target=[…]), or rules; lora_fx.rules_from_peft(config, model) makes them",
    "PeftModel": "lora_fx.load(model, directory)",
    "add_adapter": "lora_fx.add(tuned, rules, adapter=name)",
    "add_weighted_adapter": "lora_fx.combine(tuned, {name: weight}, adapter=name)",
    "delete_adapter": "lora_fx.drop(tuned, name)",
    "disable_adapter": "lora_fx.disabled(tuned)",
    "from_pretrained": "lora_fx.load(model, directory)",
    "get_peft_model": "lora_fx.apply(model, r=8, target=[…])",
    "get_peft_model_state_dict": "lora_fx.adapter_state(tuned)",
    "load_adapter": "lora_fx.add(tuned, directory, adapter=name)",
    "merge_and_unload": "lora_fx.merge(tuned)",
    "print_trainable_parameters": "lora_fx.print_trainable(tuned)",
    "save_pretrained": "lora_fx.save(tuned, directory)",
    "set_adapter": "lora_fx.use(tuned, name)",
    "set_peft_model_state_dict": "lora_fx.load_adapter_state(tuned, state)",
    "unload": "lora_fx.remove(tuned)",
}
"""What does here what a function, class or method of PEFT does."""


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
    has_ours = any(name in _OF_RULES and name not in _OF_PEFT for name in words)
    if function == "load":
        end = "load(model, directory) reads all that lora_fx.save and PEFT write"
    elif has_ours:
        rules = '{"rules": [{"match": {"name": "**.q_proj"}, "lora": {"r": 8}}]}'
        end = f"lora_fx.{function}(model, {rules}) has rules"
    else:
        end = "lora_fx.rules_from_peft(config, model) makes rules of a whole LoraConfig"
    what = "these arguments" if has_ours else "what PEFT calls"
    return "\n".join([f"{function}() does not take {what}", columns(list(words.items())), end])
