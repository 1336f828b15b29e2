"""Two models side by side → GraphDiff."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import HOME, attached_to
from lora_fx.capture.arguments import rebuild
from lora_fx.capture.captured import Captured, NotCaptured, capture
from lora_fx.capture.inputs import TensorInput
from lora_fx.graphdiff.canonical import Statement, adapted_graph, describe_spec, statements_of
from lora_fx.regions.install import regions
from lora_fx.tensors import dotted


@dataclass(frozen=True, slots=True)
class SiteChange:
    """What differs at one site or submodule."""

    path: str
    note: str
    removed: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """How two graphs differ; falsy if they do not.  Values of weights are not compared."""

    a: str
    b: str
    changes: tuple[SiteChange, ...]
    unchanged: int
    """Number of statements that are the same on both sides."""
    parameters: tuple[int, int]
    """Number of parameters of each side."""

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        from lora_fx.graphdiff.difftext import diff_text

        return diff_text(self)

    def to_json(self) -> str:
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1)


@dataclass(frozen=True, slots=True)
class _Section:
    """The statements of one region, or of what lies outside of all regions."""

    path: str
    a: list[Statement]
    b: list[Statement]


def graph_diff(a: nn.Module, b: nn.Module) -> GraphDiff:
    """Return how the graphs of two models differ, grouped by site; both models stay unchanged.

    Blocks that either model runs as graphs are compared statement by statement; what lies outside of them is compared
    module by module.  Two GraphModules are compared by their own graphs.
    """
    changes: list[SiteChange] = []
    unchanged = 0
    for section in _sections(a, b):
        found, same = _changes(section)
        changes += found
        unchanged += same
    sizes = (sum(p.numel() for p in a.parameters()), sum(p.numel() for p in b.parameters()))
    return GraphDiff(type(a).__name__, type(b).__name__, tuple(changes), unchanged, sizes)


def _sections(a: nn.Module, b: nn.Module) -> Iterator[_Section]:
    if isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule):
        yield _Section("", statements_of(a.graph, a), statements_of(b.graph, b))
        return
    covered = []
    for path, captured in _captured_regions(a, b).items():
        try:
            yield _Section(path, _region(a, path, captured), _region(b, path, captured))
            covered.append(path)
        except NotCaptured:  # one side cannot be captured like the other: compare its modules
            continue
    yield _Section("", _modules(a, covered), _modules(b, covered))


def _captured_regions(a: nn.Module, b: nn.Module) -> dict[str, Captured]:
    """Return a captured graph for every region of either model that the other has too."""
    found: dict[str, Captured] = {}
    for model, other in ((a, b), (b, a)):
        paths = {path for path, _ in other.named_modules()}
        for path, _, region in regions(model):
            programs = region.mine or region.kind.programs
            alone = isinstance(model.get_submodule(path), nn.Linear)  # shown as a module
            if programs and path in paths and path not in found and not alone:
                found[path] = programs[0].captured
    return found


def _region(model: nn.Module, path: str, captured: Captured) -> list[Statement]:
    """Return the statements of a model's submodule for the call that was captured from either model."""
    module = model.get_submodule(path)
    own = [program.captured for p, _, region in regions(model) if p == path for program in region.kind.programs]
    if (captured in own and not captured.parameters) or captured.example is None:
        graph = captured.graph
    else:
        args, kwargs = rebuild(*captured.example, lambda leaf: _filled(leaf, captured))
        with contextlib.nullcontext() if captured.surroundings is None else captured.surroundings.active():
            graph = capture(module, args, kwargs).graph
    return statements_of(adapted_graph(graph, module), module)


def _filled(leaf: object, captured: Captured) -> object:
    """Return an empty tensor on the device of the capture for a stub of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    given = (each.device for each in captured.inputs if isinstance(each, TensorInput) and each.device is not None)
    device = next(given, torch.device("cpu"))
    return torch.empty_like(leaf, device=device).requires_grad_(leaf.requires_grad)


def _modules(model: nn.Module, covered: list[str]) -> list[Statement]:
    """Return a statement for every module without children outside of the covered paths."""
    found = []
    for path, module in model.named_modules():
        inside = (
            any(not c or path == c or path.startswith(f"{c}.") for c in covered)
            or "lora_" in path
            or path.endswith(HOME)
        )
        if inside or not path:
            continue
        adapters = list(attached_to(module))
        for adapter in adapters:
            name = path.rpartition(".")[2] if adapter.home is adapter.owner else adapter.spec.parameter
            low_rank = f"{name}.lora_B({name}.lora_A(x) * {adapter.spec.scaling})"
            found.append(Statement(f"{name}(x) + {low_rank}", dotted(path, "" if adapter.home is adapter.owner else
                                                                     adapter.spec.parameter),
                                   describe_spec(adapter.spec)))  # fmt: skip
        if adapters:
            continue
        if next(module.children(), None) is None:
            found.append(Statement(_summary(path.rpartition(".")[2], module), path))
    return found


def _summary(name: str, module: nn.Module) -> str:
    return f"{name}(x)" if isinstance(module, nn.Linear) else f"{name}: {type(module).__name__}({module.extra_repr()})"


def _changes(section: _Section) -> tuple[list[SiteChange], int]:
    """Return the changes of a section by site, and the number of equal statements."""
    before, after = ([(each.site, each.text) for each in side] for side in (section.a, section.b))
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    removed: dict[str, list[str]] = {}
    added: dict[str, list[Statement]] = {}
    same = 0
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        if kind == "equal":
            same += a1 - a0
            continue
        for statement in section.a[a0:a1]:
            removed.setdefault(statement.site, []).append(statement.text)
        for statement in section.b[b0:b1]:
            added.setdefault(statement.site, []).append(statement)
    sites = dict.fromkeys((*added, *removed))
    return [_change(section.path, site, removed.get(site, []), added.get(site, [])) for site in sites], same


def _change(region: str, site: str, removed: list[str], added: list[Statement]) -> SiteChange:
    path = ".".join(filter(None, (region, site)))
    note = next((statement.adapter for statement in added if statement.adapter), "")
    return SiteChange(path, note, tuple(removed), tuple(statement.text for statement in added))
