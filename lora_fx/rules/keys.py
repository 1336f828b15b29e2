"""The keys of a rule file: type, bounds, default and meaning of each, stated here and nowhere else.

The reader holds values to a key's JSON schema, `schema` collects the keys into the schema that editors use, and the
tables of the documentation are written from the same entries.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from lora_fx.rules.inits import FAST_PISSA, INITS

OPS = ("linear", "matmul", "embedding", "conv1d", "conv2d", "conv3d", "attention", "experts")
LORA_DEFAULTS: dict[str, Any] = {"r": 8, "alpha": 16, "dropout": 0.0, "init": INITS[0], "adapter": "default"}
SHARES = ("none", "A", "B", "outer")
BY_EXPERTS = "experts"
"""What r is divided by where that is the number of matrices in a bank."""

Schema = dict[str, Any]
COUNT: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
OP: Schema = {"enum": list(OPS)}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
RANK: Schema = {"type": "integer", "minimum": 1, "maximum": 65536}
TOKEN: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
ALPHA: Schema = {"type": "number", "minimum": 1e-9, "maximum": 1_000_000_000}
ROWS = r"^\s*([0-9]{1,18})\s*\.\.\s*([0-9]{1,18})\s*$"
"""Rows of a part of a weight, first and end."""
SIZE = (
    r"^\s*(?:\*|(>=|<=|>|<)\s*([0-9]{1,18})|([0-9]{1,18})\s*\.\.\s*([0-9]{1,18})"
    r"|(?:([0-9]{1,18})\s*\*\s*)?([a-z]))\s*$"
)
"""A size in a shape: any, a bound (sign, number), a range (first, last), a multiple of a letter (factor, letter)."""
MOST_DIMENSIONS = 5
LEAST_PARTS = 2
NOT_WITH_SKIP = ("lora", "slices", "per_call")
BIASES = ("none", "lora_only", "all")
MOST_IDS, LARGEST_ID = 100_000, 2**31 - 1
"""Of one entry under `tokens`."""
_ADAPTER = r"^[A-Za-z][A-Za-z0-9_]*$"


def _list_of(item: Schema, least: int = 1, **more: Any) -> Schema:
    return {"type": "array", "items": item, "minItems": least, **more}


def _one_or_more(item: Schema) -> Schema:
    return {"anyOf": [item, _list_of(item)]}


_TEXT: Schema = {"type": "string", "pattern": r"\S"}
_SIZE: Schema = {"anyOf": [POSITIVE, {"type": "string", "pattern": SIZE}]}
_ID: Schema = {"type": "integer", "minimum": 0, "maximum": LARGEST_ID}
_ROWS: Schema = {"anyOf": [POSITIVE, *_one_or_more({"type": "string", "pattern": ROWS})["anyOf"]]}
_NAMED_PARTS = _list_of(_TEXT, LEAST_PARTS, uniqueItems=True)
_SIZED_PARTS: Schema = {"type": "object", "minProperties": LEAST_PARTS, "additionalProperties": _ROWS}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its JSON schema, one sentence about it, an example, and how people from elsewhere spell it."""

    schema: Schema
    about: str
    example: str
    foreign: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """The keys of one mapping, and where keys belong that people put there by mistake."""

    keys: dict[str, Key]
    elsewhere: dict[str, str] = field(default_factory=dict)

    @property
    def foreign(self) -> dict[str, str]:
        """What a key that is unknown here is called, or where it belongs: `rank` is `r`, and in a rule `lora.r`."""
        return {spelling: name for name, key in self.keys.items() for spelling in key.foreign} | self.elsewhere


LORA = Table(
    {
        "r": Key(RANK, f"Rank of the update, default {LORA_DEFAULTS['r']}.", "r: 16", ("rank", "lora_r")),
        "alpha": Key(
            ALPHA,
            f"The update is scaled by alpha / r; default {LORA_DEFAULTS['alpha']}.",
            "alpha: 32",
            ("lora_alpha",),
        ),
        "dropout": Key(
            {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
            f"Dropout on the adapter's input while training, default {LORA_DEFAULTS['dropout']:g}.",
            "dropout: 0.05",
            ("lora_dropout",),
        ),
        "share_dropout": Key(
            FLAG,
            "Let sites on one input (q, k and v) drop the same entries: one mask and one product for all of them.",
            "share_dropout: true",
        ),
        "init": Key(
            {"anyOf": [{"enum": list(INITS)}, {"type": "string", "pattern": FAST_PISSA}]},
            f"First values: `{INITS[0]}` (default), `gaussian` or `orthogonal` A with B zero; parts of the weight by "
            "`pissa`, `pissa_niter_N` (fast, N iterations) or `olora`; from data by `eva`, `corda`, `corda_kpm`, "
            "`lora_ga` or `loftq`; `random` for tests.",
            "init: pissa",
            ("init_lora_weights",),
        ),
        "rslora": Key(
            FLAG,
            "Scale by alpha / √r instead of alpha / r.",
            "rslora: true",
            ("use_rslora", "rank_stabilized", "rank_stabilised"),
        ),
        "dora": Key(FLAG, "Train a magnitude for each output too (DoRA).", "dora: true", ("use_dora",)),
        "lora_fa": Key(
            FLAG,
            "Freeze A at its start and train B alone (LoRA-FA): what is kept for the backward pass is r wide.",
            "lora_fa: true",
            ("lorafa", "use_lora_fa", "freeze_a", "freeze_A"),
        ),
        "bias": Key(FLAG, "Train the site's own bias too, saved with the adapter.", "bias: true"),
        "share": Key(
            {"enum": list(SHARES)},
            "Hold one factor for all experts of a bank: `A`, `B`, or `outer`, A of their first matrix and B of their "
            "last, by the names of the weights; default `none`.",
            "share: outer",
            ("experts_shared_outer_loras", "shared_outer"),
        ),
        "divide_r": Key(
            {"anyOf": [{"const": BY_EXPERTS}, RANK]},
            f"Divide r among the experts of a bank: by their number (`{BY_EXPERTS}`), or by a number, such as how many "
            "of them a token meets; default 1.",
            f"divide_r: {BY_EXPERTS}",
            ("normalize_moe_lora", "moe_rank_scaling"),
        ),
        "invocation": Key(
            _list_of(TOKEN),
            "Ids of tokens from whose last occurrence in a sequence on the adapter acts (aLoRA); before, and in rows "
            "without them, the base alone does.",
            "invocation: [128, 7, 42]",
            ("alora_invocation_tokens", "invocation_tokens"),
        ),
        "adapter": Key(
            {"type": "string", "pattern": _ADAPTER},
            f"Name of the adapter that the site belongs to, default `{LORA_DEFAULTS['adapter']}`.",
            "adapter: style",
            ("adapter_name",),
        ),
    }
)

MATCH = Table(
    {
        "name": Key(
            _one_or_more(_TEXT),
            "Globs (or `re:` expressions) over dotted paths; any may match.",
            'name: "**.{q,v}_proj"',
            ("target_modules", "path", "names"),
        ),
        "shape": Key(
            _list_of(_SIZE, maxItems=MOST_DIMENSIONS),
            "[out, in] of the weight: numbers, `*`, bounds, ranges, letters bound by their first use.",
            "shape: [3*d, d]",
        ),
        "op": Key(_one_or_more(OP), "What is done with the weight.", "op: linear", ("kind",)),
        "class": Key(_one_or_more(_TEXT), "Globs over the owner's class, short or dotted.", "class: Linear", ("type",)),
    }
)

SLICES = Table(
    {
        "of": Key(
            {"anyOf": [_NAMED_PARTS, _SIZED_PARTS]},
            "The parts of a fused weight: equal ones by name, or with their rows.",
            "of: [q, k, v]",
            required=True,
        ),
        "adapt": Key(_list_of(_TEXT, uniqueItems=True), "Which parts get an adapter.", "adapt: [q, v]", required=True),
    }
)

RULE = Table(
    {
        "name": Key(_TEXT, "What messages call the rule; default `rule 1`, `rule 2`, ….", "name: attention"),
        "match": Key(
            {"$ref": "#/$defs/match"},
            "Which sites; all given keys must hold.",
            'match: {name: "**.fc1"}',
            required=True,
        ),
        "lora": Key(
            {"$ref": "#/$defs/lora"}, "The adapter, on top of `defaults`.", "lora: {r: 16, alpha: 32}", ("config",)
        ),
        "skip": Key(
            _TEXT,
            "Leave these sites alone; the text is the reason.",
            'skip: "tied to the embedding"',
            ("ignore", "exclude"),
        ),
        "slices": Key(
            {"$ref": "#/$defs/slices"}, "Adapt parts of a fused weight.", "slices: {of: [q, k, v], adapt: [q, v]}"
        ),
        "per_call": Key(
            FLAG, "Give each call of a module that is called several times an adapter of its own.", "per_call: true"
        ),
        "expect": Key(
            {"anyOf": [COUNT, {"const": "any"}]},
            "How many sites the rule must decide; default at least one, `any` allows none.",
            "expect: 12",
        ),
    },
    {
        **{name: f"lora.{name}" for name in LORA.keys},
        **{spelling: f"lora.{name}" for spelling, name in LORA.foreign.items()},
        **{name: f"match.{name}" for name in MATCH.keys if name != "name"},
        **dict.fromkeys(("target_modules", "targets"), "match.name"),
    },
)

TOKENS = Table(
    {
        "name": Key(
            _one_or_more(_TEXT),
            "Globs of the embeddings; what is tied to them has the same rows.",
            'name: "**.embed_tokens"',
            ("embedding", "match", "path", "module"),
            required=True,
        ),
        "ids": Key(
            _list_of({"anyOf": [_ID, {"type": "string", "pattern": ROWS}]}),
            "Which rows: numbers, and ranges whose end is not included.",
            'ids: [3, "32000..32010"]',
            ("rows", "tokens", "indices", "token_indices"),
            required=True,
        ),
        "adapter": Key(
            LORA.keys["adapter"].schema, "Whose rows, where the rules have several adapters.", "adapter: style"
        ),
    }
)

TOP = Table(
    {
        "version": Key({"const": 1}, "Version of the format.", "version: 1", required=True),
        "defaults": Key({"$ref": "#/$defs/lora"}, "What all rules share.", "defaults: {r: 8, alpha: 16}", ("default",)),
        "rules": Key(
            _list_of({"$ref": "#/$defs/rule"}),
            "The rules; the first that matches a site decides it.",
            "rules: […]",
            ("rule",),
            required=True,
        ),
        "train": Key(
            _list_of(_TEXT),
            "Globs of modules that are trained whole and saved with the adapter.",
            'train: ["classifier"]',
            ("modules_to_save",),
        ),
        "tokens": Key(
            _list_of({"$ref": "#/$defs/tokens"}),
            "Rows of embeddings that are trained alone, and saved with the adapter.",
            'tokens: [{name: "**.embed_tokens", ids: [32000, 32001]}]',
            ("trainable_token_indices", "token_indices"),
        ),
        "bias": Key(
            {"enum": list(BIASES)},
            "Which biases are trained: `none`, `lora_only` (of adapted layers), or `all` of the model.",
            "bias: all",
        ),
    },
    {
        **{spelling: f"defaults.{name}" for name, key in LORA.keys.items() for spelling in (name, *key.foreign)},
        **dict.fromkeys(("target_modules", "targets"), "rules[0].match.name"),
    },
)


def is_adapter_name(name: object) -> bool:
    """Whether an adapter can bear the name: letters, digits and _, a letter first."""
    return isinstance(name, str) and re.fullmatch(_ADAPTER, name) is not None
