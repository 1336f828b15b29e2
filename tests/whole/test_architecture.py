"""The shape of the code itself: imports go one way, files and functions stay short, public names are documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import lora_fx

PACKAGE = Path(lora_fx.__file__).parent
# each layer may import those before it, and itself; a name ending in a dot is a package
LAYERS = [
    ["errors", "text", "health", "clients."],
    ["automaton", "globs", "expressions", "patterns", "yamltree", "rulespec", "shipped"],
    ["rules", "rulereading", "slicereading", "linting", "schema"],
    ["sites"],
    ["planning", "plantext", "planjson", "explaining", "plandiff", "plantree", "planhtml"],
    ["swap", "twin", "tensors", "samples", "ties"],
    ["layerkinds", "quantised"],
    ["adapters."],
    ["capture."],
    ["editor"],
    ["records", "passes."],
    ["weightuses"],
    ["discovery"],
    ["modules"],
    ["regions."],
    ["applying", "surveying"],
    ["unapplying", "requantising", "reporting", "foreign", "parametrized", "remerging", "extraction"],
    ["checkpoint.", "graphdiff."],
    ["exporters."],
    ["integrations."],
    ["api"],
    ["selftest", "checkpointmodel", "modelspec", "modelloading"],
    ["bench."],
    ["cli."],
    ["__main__"],
]
NO_TORCH = {name for layer in LAYERS[:5] for name in layer} - {"clients."} | {"cli.", "__main__"}


def layer_of(module: str) -> int:
    for index, layer in enumerate(LAYERS):
        if module in layer or f"{module.split('.')[0]}." in layer:
            return index
    raise AssertionError(f"{module} is in no layer")


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "shipped_rules" not in path.parts)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Return the modules of lora_fx that a file imports, wherever in it, type checking apart."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {id(n) for node in ast.walk(tree) if _is_type_checking(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in hidden:
            if node.module == "lora_fx":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("lora_fx."):
                found.add(node.module.removeprefix("lora_fx."))
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_go_one_way(path):
    own = name_of(path)
    if own == "":
        return
    for other in imports_of(path):
        assert layer_of(other) <= layer_of(own), f"{own} imports {other}"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_nothing_up_to_planning_imports_torch(path):
    own = name_of(path)
    if own not in NO_TORCH and f"{own.split('.')[0]}." not in NO_TORCH:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] in ("torch", "numpy", "safetensors", "networkx") for name in names)


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_private_torch_is_imported_in_one_file_only(path):
    if path.name == "torch_internals.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), f"{path.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def functions() -> list[tuple[str, ast.FunctionDef]]:
    found = []
    for path in files():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [(f"{name_of(path)}.{n.name}", n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return found


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


@pytest.mark.parametrize("name", lora_fx.__all__)
def test_public_names_are_documented(name):
    thing = getattr(lora_fx, name)
    assert thing.__doc__
    if inspect.isfunction(thing):
        assert thing.__doc__.startswith(("Return", "Write")), "the first line says what comes back"


def test_no_attribute_is_guessed():
    guesses = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                guesses.append(f"{name_of(path)}:{node.lineno}")
    assert guesses == []
