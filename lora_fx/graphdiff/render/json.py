"""A GraphDiff as JSON: the changes by site, the sums, and the edits that turn one graph into the other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from lora_fx.graphdiff.changes import GraphDifference, GraphEdit
from lora_fx.graphdiff.graphs import statement_data, weights_data


def diff_json(diff: GraphDifference) -> str:
    """Return the diff as JSON; `edits` are in the order of b."""
    document = {"schema_version": 1} | asdict(replace(diff, comparison=None))
    del document["comparison"]
    edits = () if diff.comparison is None else diff.comparison.edits
    lines = (json.dumps(_edit(edit), ensure_ascii=False) for edit in edits)
    head = json.dumps(document, indent=1, ensure_ascii=False)
    return f'{head[:-2]},\n "edits": [\n  ' + ",\n  ".join(lines) + "\n ]\n}"


def _edit(edit: GraphEdit) -> dict[str, Any]:
    data: dict[str, Any] = {"before": edit.before, "after": edit.after}
    if edit.node is not None:
        data["node"] = statement_data(edit.node)
        data["weights"] = weights_data(edit.weights)
    return data
