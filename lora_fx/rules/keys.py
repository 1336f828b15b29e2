"""The keys of a rule file: type, bounds, default and meaning of each, stated here and nowhere else.

The reader holds values to a key's JSON schema, `schema` collects the keys into the schema that editors use, and the
tables of the documentation are written from the same entries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

OPS = ("linear", "matmul", "embedding", "conv1d", "conv2d", "conv3d", "attention", "experts")
INITS = ("kaiming", "gaussian", "orthogonal", "random")
LORA_DEFAULTS: dict[str, Any] = {"r": 8, "alpha": 16, "dropout": 0.0, "init": INITS[0], "adapter": "default"}

_MODULE_NAMES = """
add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double dump_patches eval extra_repr
float forward get_buffer get_extra_state get_parameter get_submodule half ipu items keys load_state_dict modules mtia
named_buffers named_children named_modules named_parameters parameters pop register_backward_hook register_buffer
register_forward_hook register_forward_pre_hook register_full_backward_hook register_full_backward_pre_hook
register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module register_parameter
register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state set_submodule share_memory
state_dict to to_empty train training type update values xpu zero_grad T_destination
"""
MODULE_NAMES = tuple(_MODULE_NAMES.split())
"""No adapter can bear the name of an attribute of torch's nn.ModuleDict, which holds the adapters of a site."""

_TEXT: dict[str, Any] = {"type": "string", "pattern": r"\S"}
_TEXTS: dict[str, Any] = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}]}
_OP: dict[str, Any] = {"enum": list(OPS)}
_SIZE = r"^\s*(\*|(>=|<=|>|<)\s*\d+|\d+\s*\.\.\s*\d+|(\d+\s*\*\s*)?[a-z])\s*$"
_ADAPTER = r"^[A-Za-z][A-Za-z0-9_]*$"
ROWS = r"^\s*(\d+)\s*\.\.\s*(\d+)\s*$"
"""Rows of a part of a weight, first and end."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its JSON schema, one sentence about it, and an example."""

    schema: dict[str, Any]
    about: str
    example: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """The keys of one mapping, and how people who come from elsewhere spell them."""

    keys: dict[str, Key]
    foreign: dict[str, str] = field(default_factory=dict)


LORA = Table(
    {
        "r": Key({"type": "integer", "minimum": 1}, f"Rank of the update, default {LORA_DEFAULTS['r']}.", "r: 16"),
        "alpha": Key(
            {"type": "number", "exclusiveMinimum": 0},
            f"The update is scaled by alpha / r; default {LORA_DEFAULTS['alpha']}.",
            "alpha: 32",
        ),
        "dropout": Key(
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            f"Dropout on the adapter's input while training, default {LORA_DEFAULTS['dropout']:g}.",
            "dropout: 0.05",
        ),
        "share_dropout": Key(
            {"type": "boolean"},
            "Let sites on one input (q, k and v) drop the same entries: one mask and one product for all of them.",
            "share_dropout: true",
        ),
        "init": Key(
            {"enum": list(INITS)},
            f"First values: `{INITS[0]}` (default), `gaussian` or `orthogonal` A with B zero; `random` for tests.",
            "init: gaussian",
        ),
        "rslora": Key({"type": "boolean"}, "Scale by alpha / √r instead of alpha / r.", "rslora: true"),
        "dora": Key({"type": "boolean"}, "Train a magnitude for each output too (DoRA).", "dora: true"),
        "bias": Key({"type": "boolean"}, "Train the site's own bias too, saved with the adapter.", "bias: true"),
        "adapter": Key(
            {"type": "string", "pattern": _ADAPTER, "not": {"enum": list(MODULE_NAMES)}},
            f"Name of the adapter that the site belongs to, default `{LORA_DEFAULTS['adapter']}`.",
            "adapter: style",
        ),
    },
    {
        "rank": "r",
        "lora_r": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "init_lora_weights": "init",
        "use_dora": "dora",
        "use_rslora": "rslora",
        "rank_stabilized": "rslora",
        "rank_stabilised": "rslora",
        "adapter_name": "adapter",
    },
)

MATCH = Table(
    {
        "name": Key(_TEXTS, "Globs (or `re:` expressions) over dotted paths; any may match.", 'name: "**.{q,v}_proj"'),
        "shape": Key(
            {
                "type": "array",
                "minItems": 1,
                "maxItems": 5,
                "items": {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _SIZE}]},
            },
            "[out, in] of the weight: numbers, `*`, bounds, ranges, letters bound by their first use.",
            "shape: [3*d, d]",
        ),
        "op": Key(
            {"anyOf": [_OP, {"type": "array", "items": _OP, "minItems": 1}]},
            "What is done with the weight.",
            "op: linear",
        ),
        "class": Key(_TEXTS, "Globs over the owner's class, short or dotted.", "class: Linear"),
    },
    {"target_modules": "name", "path": "name", "names": "name", "type": "class", "kind": "op"},
)

SLICES = Table(
    {
        "of": Key(
            {
                "anyOf": [
                    {"type": "array", "items": _TEXT, "minItems": 2, "uniqueItems": True},
                    {
                        "type": "object",
                        "minProperties": 2,
                        "additionalProperties": {
                            "anyOf": [
                                {"type": "integer", "minimum": 1},
                                {"type": "string", "pattern": ROWS},
                                {"type": "array", "minItems": 1, "items": {"type": "string", "pattern": ROWS}},
                            ]
                        },
                    },
                ]
            },
            "The parts of a fused weight: equal ones by name, or with their rows.",
            "of: [q, k, v]",
            required=True,
        ),
        "adapt": Key(
            {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True},
            "Which parts get an adapter.",
            "adapt: [q, v]",
            required=True,
        ),
    }
)

RULE = Table(
    {
        "name": Key(_TEXT, "What messages call the rule; default `rule 1`, `rule 2`, ….", "name: attention"),
        "match": Key(
            {"$ref": "#/$defs/match"}, "Which sites; all given keys must hold.", 'match: {name: "**.fc1"}', True
        ),
        "lora": Key({"$ref": "#/$defs/lora"}, "The adapter, on top of `defaults`.", "lora: {r: 16, alpha: 32}"),
        "skip": Key(_TEXT, "Leave these sites alone; the text is the reason.", 'skip: "tied to the embedding"'),
        "slices": Key(
            {"$ref": "#/$defs/slices"}, "Adapt parts of a fused weight.", "slices: {of: [q, k, v], adapt: [q, v]}"
        ),
        "per_call": Key(
            {"type": "boolean"},
            "Give each call of a module that is called several times an adapter of its own.",
            "per_call: true",
        ),
        "expect": Key(
            {"anyOf": [{"type": "integer", "minimum": 0}, {"const": "any"}]},
            "How many sites the rule must decide; default at least one, `any` allows none.",
            "expect: 12",
        ),
    },
    {
        "target_modules": "match.name",
        "targets": "match.name",
        "config": "lora",
        "ignore": "skip",
        "exclude": "skip",
        **{key: f"lora.{key}" for key in LORA.keys},
        **{foreign: f"lora.{key}" for foreign, key in LORA.foreign.items()},
        **{key: f"match.{key}" for key in MATCH.keys if key != "name"},
    },
)

TOP = Table(
    {
        "version": Key({"const": 1}, "Version of the format.", "version: 1", required=True),
        "defaults": Key({"$ref": "#/$defs/lora"}, "What all rules share.", "defaults: {r: 8, alpha: 16}"),
        "rules": Key(
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/rule"}},
            "The rules; the first that matches a site decides it.",
            "rules: […]",
            required=True,
        ),
        "train": Key(
            {"type": "array", "minItems": 1, "items": _TEXT},
            "Globs of modules that are trained whole and saved with the adapter.",
            'train: ["classifier"]',
        ),
    },
    {"modules_to_save": "train", "default": "defaults", "rule": "rules"},
)


def is_adapter_name(name: str) -> bool:
    """Whether an adapter can bear the name: letters, digits and _, a letter first, and free in torch."""
    return re.fullmatch(_ADAPTER, name) is not None and name not in MODULE_NAMES
