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
    ["text", "sources"],
    ["errors", "progress"],
    ["rules"],
    ["planning"],
    ["models"],
    ["adapters"],
    ["liveness"],
    ["capture"],
    ["passes"],
    ["regions"],
    ["discovery"],
    ["tuned"],
    ["graphdiff", "files", "remerging"],
    ["training"],
    ["exporters", "integrations"],
    ["api"],
    ["bench"],
    ["meshes"],
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


def private_torch(tree: ast.AST) -> list[str]:
    """Return the uses of torch's private names in code, as `line: what`.

    Seen are imports (`from torch._x import y`, `from torch.x import _y`), attribute chains that start at torch or at
    something imported from it (`torch._C._functorch`, `nn.modules.conv._ConvNd`), getattr with a constant name, and
    `importlib.import_module("torch._x")`.  Double underscores are public; so are attributes of objects, such as the
    `_parameters` of a module.
    """
    names = _names_of_torch(tree)
    uses: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            uses |= {(node.lineno, alias.name) for alias in node.names if _is_private(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            uses |= {(node.lineno, full) for full in _imported_names(node) if _is_private(full)}
        elif isinstance(node, ast.Attribute) and _is_private(f"torch.{node.attr}"):
            chain = _chain(node, names)
            uses |= {(node.lineno, chain)} if chain is not None else set()
        elif isinstance(node, ast.Call) and _is_private(named := _named_in_text(node, names)):
            uses.add((node.lineno, named))
    return [f"{line}: {name}" for line, name in sorted(uses)]


def _is_private(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)


def _imported_names(node: ast.ImportFrom) -> list[str]:
    return [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else []


def _names_of_torch(tree: ast.AST) -> dict[str, str]:
    """Return what each name that is imported from torch stands for: `nn` for `torch.nn`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            names |= {alias.name.split(".")[0]: alias.name.split(".")[0] for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom):
            local = [alias.asname or alias.name for alias in node.names]
            names |= dict(zip(local, _imported_names(node), strict=False))
    return {name: full for name, full in names.items() if full.split(".")[0] == "torch"}


def _chain(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the dotted name of a chain of attributes that starts at torch, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    before = _chain(node.value, names)
    return None if before is None else f"{before}.{node.attr}"


def _named_in_text(call: ast.Call, names: dict[str, str]) -> str:
    """Return the name that a call looks up by a constant text: import_module("torch._x"), getattr(torch, "_x")."""
    texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    function = ast.unparse(call.func).split(".")[-1]
    if not texts:
        return ""
    if function == "getattr":
        return f"{_chain(call.args[0], names)}.{texts[0]}"
    return texts[0] if function in ("import_module", "__import__") else ""
