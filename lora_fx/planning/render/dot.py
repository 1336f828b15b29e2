"""Graphs in Graphviz's language."""

import json
from collections.abc import Iterable

from lora_fx.text import visible


def digraph(name: str, lines: Iterable[str]) -> str:
    """Return a directed graph of lines in Graphviz's language."""
    return "\n".join([f"digraph {name} {{", *lines, "}"])


def quoted(text: str) -> str:
    """Return a text as Graphviz reads it between quotes."""
    return json.dumps(visible(text, kept="\n"), ensure_ascii=False)
