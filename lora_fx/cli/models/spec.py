"""MODEL on the command line: a factory in a package or a file, a model of transformers, or a file of weights."""

import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lora_fx.api import apply, diff
from lora_fx.cli.models.checkpoint import INDEX_SUFFIX, checkpoint_model
from lora_fx.cli.models.hub import directory_of
from lora_fx.cli.models.pretrained import ModelSpecError, from_transformers
from lora_fx.graphdiff.diff import GraphDiff
from lora_fx.graphdiff.graphs import Graph
from lora_fx.graphdiff.models import Comparable, graph_of
from lora_fx.graphdiff.programs import load_program
from lora_fx.models.code import module_of
from lora_fx.models.samples import call
from lora_fx.rules.ruleset import RuleSet

FORMS = "package.module:factory, file.py:factory, hf:DIRECTORY, hf:ORG/NAME, a .pt2 or a .safetensors file"

_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def load_model(spec: str, weights: bool = False, trust: bool = False) -> tuple[nn.Module, object]:
    """Return (model, example inputs or None) for what the user wrote as MODEL.

    `package.module:factory` and `file.py:factory` execute that code; the factory is called without arguments, and
    returns a model or (model, example_inputs).  A `.pt2` file is loaded whole; of a `.safetensors` file only the header
    is read.

    Args:
        spec: the text.
        weights: with values, for evaluation.  Without them the factory is called on the meta device, and
            `hf:DIRECTORY` and `hf:ORG/NAME@REVISION` need the configuration only.
        trust: that reading a `.pt2` file may run code.

    Raises:
        ModelSpecError: says what is wrong with the text, the file, or what the factory returned.
    """
    if spec.endswith(".pt2"):
        return _of_program(spec, trust)
    if spec.endswith((".safetensors", ".index.json")) and weights:
        raise ModelSpecError(f"'{spec}' has names and weights only, and no model: give hf:DIRECTORY or a factory")
    if spec.endswith((".safetensors", INDEX_SUFFIX)):
        return checkpoint_model(spec), None
    scheme, _, rest = spec.partition(":")
    if not scheme or not rest:
        raise ModelSpecError(f"'{spec}' is not a model: write {FORMS}{_meant(spec)}")
    if scheme == "hf":
        rest = directory_of(rest, weights)
    with contextlib.nullcontext() if weights else torch.device("meta"):
        made = from_transformers(rest, weights) if scheme == "hf" else called(scheme, rest)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"'{spec}' gives an object of type {type(model).__name__}, not a torch.nn.Module")
    return (model.eval() if weights else model), inputs


def compared(a: str | Graph, b: str | Graph, trust: bool, progress: bool | None = None) -> GraphDiff:
    """Return how two models differ, each given as MODEL or as a graph."""
    first, second = (_comparable(side, trust) for side in (a, b))
    inputs = first[1] if first[1] is not None else second[1]
    return diff(first[0], second[0], inputs, trust=trust, progress=progress)


def compared_by_rules(spec: str, rules: Sequence[RuleSet], trust: bool, progress: bool | None = None) -> GraphDiff:
    """Return what rules change in a model's graph; of two rule sets, how the two adapted models differ."""
    model, inputs = load_model(spec, trust=trust)
    *before, after = [model, *(apply(model, read, inputs, progress=progress) for read in rules)]
    return diff(before[-1], after, inputs, progress=progress)


def graph_text(spec: str, trust: bool) -> str:
    """Return a model's graph as JSON."""
    return graph_of(*_comparable(spec, trust), trust).to_json()


def _comparable(spec: str | Graph, trust: bool) -> tuple[Comparable, object]:
    """Return (what `diff` takes, example inputs or None); a `.pt2` file is read there."""
    if isinstance(spec, str) and not spec.endswith(".pt2"):
        return load_model(spec, trust=trust)
    return spec, None


def _of_program(path: str, trust: bool) -> tuple[nn.Module, object]:
    """Return the module of a file that `torch.export.save` wrote, and the inputs that it was exported with."""
    program = load_program(Path(path), trust)
    given = program.example_inputs
    return module_of(program), call(*given[0], **given[1]) if given else None


def _module_at(home: str) -> ModuleType:
    if home.endswith(".py"):
        return _module_of_file(Path(home))
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: modules of the current directory
    try:
        return importlib.import_module(home)
    except ModuleNotFoundError as error:
        if error.name is None or not home.startswith(error.name):
            raise  # the module is there, one that it needs is not
        raise ModelSpecError(f"there is no module '{home}'") from error


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelSpecError(f"{path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))  # as `python file.py` does: what lies beside it can be imported
    name = f"_{path.stem}" if path.stem in sys.modules else path.stem  # a file may be called json.py
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _meant(spec: str) -> str:
    """Return a line that tells which form of MODEL a text without one looks like; "" if it looks like none."""
    if Path(spec).suffix == ".py":
        return f"\n  name the function in it that makes the model: {spec}:NAME"
    if (Path(spec) / "config.json").is_file() or _ON_HUB.fullmatch(spec):
        return f"\n  did you mean hf:{spec}?"
    return ""


def called(home: str, name: str) -> Any:
    """Return what a factory of a module, or of a file `.py`, makes; a model that stands there is taken as it is."""
    module = _module_at(home)
    if name not in vars(module):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelSpecError(f"{home} has no '{name}'; it has {', '.join(known[:10]) or 'nothing to call'}")
    factory = vars(module)[name]
    return factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
