"""The JSON schema of rule files, for editors; made from the same tables that the reader uses."""

import json

from lora_fx.rules.keys import LORA, MATCH, NOT_WITH_SKIP, RULE, SLICES, TOKENS, TOP, Schema, Table


def json_schema() -> Schema:
    """Return the schema (JSON Schema, draft 2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lora_fx rules",
        **_object(TOP),
        "$defs": {
            "lora": _object(LORA),
            "match": {**_object(MATCH), "minProperties": 1},
            "slices": _object(SLICES),
            "tokens": _object(TOKENS),
            "rule": {
                **_object(RULE),
                "not": {"anyOf": [{"required": ["skip", other]} for other in NOT_WITH_SKIP]},
            },
        },
    }


def _object(table: Table) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, key in table.keys.items() if key.required],
        "properties": {name: {"description": key.about, **key.schema} for name, key in table.keys.items()},
    }


def schema_text() -> str:
    """Return the schema as the text that is shipped."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
