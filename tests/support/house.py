"""The shape of the package, read off its files: which imports which, wherever in a file the import stands."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import networkx as nx

import lora_fx

PACKAGE = Path(lora_fx.__file__).parent
ROOT_FILES = {"__init__", "__main__", "api", "errors", "text"}
ORDER = [
    ["text"],
    ["errors"],
    ["rules"],
    ["planning"],
    ["models"],
    ["adapters"],
    ["capture"],
    ["passes"],
    ["regions"],
    ["discovery"],
    ["tuned"],
    ["graphdiff", "files", "remerging"],
    ["exporters", "integrations"],
    ["api"],
    ["bench"],
    ["cli"],
]
"""Folders and files at the root in the order of the pipeline: each imports those of earlier rows, and itself."""
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def files() -> list[Path]:
    """Return every Python file of the package."""
    return sorted(path for path in PACKAGE.rglob("*.py") if "shipped_rules" not in path.parts)


def module_of(path: Path) -> str:
    """Return the dotted name of a file below the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_in(tree: ast.AST, modules: frozenset[str]) -> set[str]:
    """Return the modules of the package that code imports: at the top, in functions, under TYPE_CHECKING.

    Args:
        tree: of a file.
        modules: names of all modules of the package, to tell a module from a name in one.
    """
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_fx":
            home = node.module.removeprefix("lora_fx").removeprefix(".")
            names = {f"{home}.{alias.name}".removeprefix(".") for alias in node.names}
            imported |= {name if name in modules else home for name in names}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if alias.name.startswith("lora_fx.")}
            imported |= {name.removeprefix("lora_fx.") for name in names}
    return imported - {""}


@functools.cache
def import_graph() -> nx.DiGraph:
    """Return a graph with an edge from each module to those that it imports; the package's own `__init__` apart."""
    modules = frozenset(module_of(path) for path in files())
    graph = nx.DiGraph()
    for path in files():
        module = module_of(path)
        if module:
            graph.add_node(module)
            graph.add_edges_from((module, other) for other in imports_in(tree_of(path), modules) if other != module)
    return graph


def circles(graph: nx.DiGraph) -> list[list[str]]:
    """Return the groups of modules that import each other in a loop."""
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def climbs(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """Return the imports that lead to a folder that is not an earlier one."""

    def top(module: str) -> str:
        return module.split(".")[0]

    ranks = {**RANK, "__main__": len(ORDER)}
    return sorted((a, b) for a, b in graph.edges if top(a) != top(b) and ranks[top(b)] >= ranks[top(a)])
