"""The shape of the code itself: imports go one way, files and functions stay short, public names are documented."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from pathlib import Path

import networkx as nx
import pytest

import lora_fx
from tests.support.house import (
    PACKAGE,
    RANK,
    ROOT_FILES,
    circles,
    climbs,
    files,
    import_graph,
    imports_in,
    module_of,
    private_torch,
    tree_of,
)

TESTS = Path(__file__).parents[1]
NO_TORCH = {"text", "sources", "errors", "progress", "rules", "planning", "cli", "__main__"}


def test_five_files_and_the_folders_of_the_pipeline_stand_at_the_root():
    assert {path.stem for path in PACKAGE.glob("*.py")} == ROOT_FILES
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(RANK) - ROOT_FILES


def test_a_folder_imports_only_those_named_before_it():
    assert climbs(import_graph()) == []


def test_no_files_import_each_other_in_a_circle():
    assert circles(import_graph()) == []


def test_imports_to_later_folders_and_circles_are_found_wherever_they_stand():
    code = """
if TYPE_CHECKING:
    from lora_fx.api import plan

def late():
    from lora_fx.models import twin
    import lora_fx.cli.plan
"""
    modules = frozenset({"api", "models", "models.twin", "cli.plan"})
    imported = imports_in(ast.parse(code), modules)
    assert imported == {"api", "models.twin", "cli.plan"}
    graph = nx.DiGraph([("models.twin", other) for other in imported - {"models.twin"}])
    assert climbs(graph) == [("models.twin", "api"), ("models.twin", "cli.plan")]
    assert climbs(nx.DiGraph([("files.atomic", "graphdiff.graphs")])) == [("files.atomic", "graphdiff.graphs")]
    assert circles(nx.DiGraph([("rules.a", "rules.b"), ("rules.b", "rules.a")])) == [["rules.a", "rules.b"]]


def test_imports_of_the_package_stand_at_the_top_of_a_file_but_in_the_command_line():
    hidden = [
        f"{module_of(path)}:{inner.lineno}"
        for path in files()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and module_of(path).split(".")[0] not in ("cli", "__main__")
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").startswith("lora_fx")
    ]
    assert hidden == []


def test_file_names_say_what_is_in_them():
    vague = {"notes", "readings", "log", "uses", "pairs", "neutral", "records", "utils", "helpers", "misc", "common"}
    assert [module_of(path) for path in files() if path.stem in vague] == []


def test_nothing_but_the_table_of_public_names_needs_remerging():
    readers = {a for a, b in import_graph().edges if b.split(".")[0] == "remerging" and a.split(".")[0] != "remerging"}
    assert readers == set()


def test_the_name_of_a_test_file_is_used_once():
    """pytest imports them by that name alone."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []


def test_a_class_name_is_used_once():
    named: dict[str, list[str]] = {}
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                named.setdefault(node.name, []).append(module_of(path))
    assert {name: homes for name, homes in named.items() if len(homes) > 1} == {}


def test_nothing_up_to_planning_imports_torch():
    found = []
    for path in files():
        own = module_of(path)
        if own.split(".")[0] not in NO_TORCH or own.startswith("cli.models"):
            continue
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            large = [name for name in names if name.split(".")[0] in ("torch", "numpy", "safetensors", "networkx")]
            found += [f"{own}: {name}" for name in large]
    assert found == []


def test_private_torch_is_used_in_one_file_only():
    used = {
        module_of(path): [use.split(": ")[1] for use in private_torch(tree_of(path))]
        for path in files()
        if path.name != "torch_internals.py"
    }
    assert {own: uses for own, uses in used.items() if uses} == {"exporters.clients": ["torch._inductor"]}


@pytest.mark.parametrize(
    ("code", "uses"),
    [
        ("import torch._dynamo", ["1: torch._dynamo"]),
        ("from torch._ops import OpOverload", ["1: torch._ops.OpOverload"]),
        (
            "from torch.amp.autocast_mode import _enter_autocast as enter",
            ["1: torch.amp.autocast_mode._enter_autocast"],
        ),
        ("def f():\n  from torch.utils import _pytree", ["2: torch.utils._pytree"]),
        ("import torch\ntorch._C._functorch.peek()", ["2: torch._C", "2: torch._C._functorch"]),
        ("import torch as t\nt.utils._pytree", ["2: torch.utils._pytree"]),
        ("from torch import nn\nnn.modules.conv._ConvNd", ["2: torch.nn.modules.conv._ConvNd"]),
        ("import importlib\nimportlib.import_module('torch._inductor')", ["2: torch._inductor"]),
        ("import torch\ngetattr(torch, '_C')", ["2: torch._C"]),
        ("from torch import nn\nnn.Linear.__call__\nnn.Linear(1, 1)._parameters\nself._x.torch", []),
        ("import torch\ntorch.__version__\nimport numpy\nnumpy._core", []),
    ],
)
def test_private_torch_is_seen_however_it_is_reached(code, uses):
    assert private_torch(ast.parse(code)) == uses


def test_files_stay_short():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (*files(), *TESTS.rglob("*.py"))}
    assert {"/".join(path.parts[-3:]): number for path, number in lines.items() if number > 400} == {}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    results = []
    for path in files():
        tree = tree_of(path)
        results += [(f"{module_of(path)}.{n.name}", n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return results


def length(function: ast.FunctionDef) -> int:
    """Number of lines of the body, docstring apart."""
    body = function.body
    has_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    first = body[1] if has_docstring and len(body) > 1 else body[0]
    return body[-1].end_lineno - first.lineno + 1


def test_functions_stay_short():
    lengths = sorted(length(function) for _, function in functions())
    assert lengths[len(lengths) // 2] <= 8
    assert lengths[int(0.9 * len(lengths))] <= 25
    assert [name for name, function in functions() if length(function) > 45] == []


def test_api_functions_read_like_a_table_of_contents():
    tree = ast.parse((PACKAGE / "api.py").read_text(encoding="utf-8"))
    too_long = {n.name: length(n) for n in tree.body if isinstance(n, ast.FunctionDef) and length(n) > 15}
    assert set(too_long) <= {"_planned"}


def test_no_module_bears_the_name_of_a_public_function():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert not modules & {name for name in lora_fx.__all__ if name.islower()}


def test_public_names_are_documented():
    things = {name: getattr(lora_fx, name) for name in lora_fx.__all__}
    assert [name for name, thing in things.items() if not thing.__doc__] == []
    first = {name: thing.__doc__.partition("\n")[0] for name, thing in things.items() if inspect.isfunction(thing)}
    silent = [
        name for name, says in first.items() if not says.startswith(("Return", "Write")) and ", in place" not in says
    ]
    assert silent == [], "the first line says what comes back, or that something is changed in place"


def test_no_attribute_is_guessed():
    guesses = []
    for path in files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                guesses.append(f"{module_of(path)}:{node.lineno}")
    assert guesses == []
