"""Models as Graphs: blocks statement by statement where a graph of them is known, everything else module by module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lora_fx.adapters.attach import HOME, attached_to
from lora_fx.capture.calls.arguments import rebuild
from lora_fx.capture.captured import Captured, NotCaptured, capture
from lora_fx.capture.reads.dependencies import AttributePath
from lora_fx.capture.reads.frozen import Freezer, Frozen, OfType, Unfreezable
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.discovery.sites import take_inventory
from lora_fx.discovery.study import observed
from lora_fx.graphdiff.canonical import Statements, adapted_graph, describe_spec, placed, statements_of
from lora_fx.graphdiff.costs import called_flops, weights_in
from lora_fx.graphdiff.diff import GraphDiff, compare
from lora_fx.graphdiff.graphs import Graph, Statement, Weight, escaped
from lora_fx.graphdiff.programs import graph_of_program, load_program
from lora_fx.models.layers import is_layer
from lora_fx.models.samples import samples_of
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import attribute_at, dotted
from lora_fx.models.twin import make_twin
from lora_fx.regions.install import regions
from lora_fx.regions.structure import structure_of
from lora_fx.regions.survey import survey, unchanged_modes

Comparable: TypeAlias = nn.Module | ExportedProgram | Graph | str | os.PathLike[str]


def graph_diff(a: Comparable, b: Comparable, example_inputs: object = None) -> GraphDiff:
    """Return how the graphs of two models differ, grouped by site; both models stay unchanged.

    Blocks that either model runs as graphs are compared statement by statement; what lies outside of them is compared
    module by module.  GraphModules, exported programs and saved graphs are compared as they are.
    """
    if isinstance(a, nn.Module) and isinstance(b, nn.Module) and not (_is_graph(a) and _is_graph(b)):
        return compare(*_pair(a, b, example_inputs))
    return compare(graph_of(a, example_inputs), graph_of(b, example_inputs))


def graph_of(model: Comparable, example_inputs: object = None) -> Graph:
    """Return the graph of a model, of an exported program, or of a `.pt2` or `.json` file; nothing is changed."""
    if isinstance(model, Graph):
        return model
    if isinstance(model, ExportedProgram):
        return graph_of_program(model, type(model).__name__)
    if isinstance(model, nn.Module):
        return _graph(model, {} if _is_graph(model) else _own_captures(model, example_inputs))
    path = Path(model)
    return graph_of_program(load_program(path), path.name) if path.suffix == ".pt2" else Graph.load(path)


def _is_graph(model: nn.Module) -> bool:
    return isinstance(model, fx.GraphModule)


def _pair(a: nn.Module, b: nn.Module, example_inputs: object) -> tuple[Graph, Graph]:
    """Return the graphs of two models, each block captured for one and the same call."""
    found: dict[str, Captured] = {}
    for model, other in ((a, b), (b, a)):
        paths = {path for path, _ in other.named_modules()}
        own = _own_captures(model, example_inputs)
        found |= {path: each for path, each in own.items() if path in paths and path not in found}
    sides = [_Blocks(model) for model in (a, b)]
    both = {path for path, captured in found.items() if all(side.knows(path, captured) for side in sides)}
    shared = {path: captured for path, captured in found.items() if path in both}
    return tuple(_graph(side.model, shared, side) for side in sides)  # type: ignore[return-value]


def _own_captures(model: nn.Module, example_inputs: object) -> dict[str, Captured]:
    """Return a captured graph for every region of the model, or, without regions, for what the inputs show."""
    found = {}
    for path, module, region in regions(model):
        captures = [program.captured for program in region.mine or region.kind.programs]
        fitting = [each for each in captures if _reads_the_same(module, each, each)]  # blocks may share what they learn
        if fitting and not is_layer(module):  # shown as a module
            found[path] = fitting[0]
    return found if found or example_inputs is None else _surveyed(model, example_inputs)


def _surveyed(model: nn.Module, example_inputs: object) -> dict[str, Captured]:
    samples_of(example_inputs)
    seen = observed(model, example_inputs)
    sites = [site.path for site in take_inventory(model, seen.uses).sites]
    found = survey(make_twin(model), seen.samples, sites)
    known = {path: found.library.get(found.structures[path], []) for path in found.graphs}
    return {path: programs[0][0] for path, programs in known.items() if programs}


@dataclass(slots=True)
class _Blocks:
    """The statements of a model's blocks; identical blocks are captured and written once."""

    model: nn.Module
    known: dict[Any, list[tuple[Captured, Statements]]] = field(default_factory=dict)
    failed: dict[Any, None] = field(default_factory=dict)

    def knows(self, path: str, captured: Captured) -> bool:
        """Whether the block can be captured for that call."""
        try:
            self.statements(path, captured)
        except NotCaptured:  # compare its modules
            return False
        return True

    def statements(self, path: str, captured: Captured) -> Statements:
        """Return the statements of the block at a path for the call of `captured`, which may be another model's."""
        module = self.model.get_submodule(path)
        key = (structure_of(module), id(captured))
        for made, found in self.known.get(key, ()):
            if _reads_the_same(module, made, captured):
                return found
        if key in self.failed:
            raise NotCaptured("an identical block cannot be captured")
        try:
            made = self._captured(path, module, captured)
        except NotCaptured:
            self.failed[key] = None
            raise
        found = statements_of(adapted_graph(made.graph, module), module)
        self.known.setdefault(key, []).append((made, found))
        return found

    def _captured(self, path: str, module: nn.Module, captured: Captured) -> Captured:
        own = [
            program.captured for p, _, region in regions(self.model) if p == path for program in region.kind.programs
        ]
        mine = any(each is captured for each in own)
        if (mine and not captured.parameters) or captured.example is None:
            return captured
        args, kwargs = rebuild(*captured.example, lambda leaf: _filled(leaf, captured))
        with _in_its_mode(module, captured):
            return capture(module, args, kwargs)


def _reads_the_same(module: nn.Module, made: Captured, wanted: Captured) -> bool:
    """Whether the module holds what a capture of an identical one relied on, but for the numbers of layers."""
    freezer = Freezer({id(each): path for path, each in module.named_modules()})

    def holds(place: AttributePath, frozen: Frozen) -> bool:
        value = attribute_at(module, str(place))
        return type(value) is frozen.kind if isinstance(frozen, OfType) else freezer.freeze(value) == frozen

    try:
        reads = ((place, value) for place, value in made.dependencies.read.items() if place not in wanted.parameters)
        same = all(
            attribute_at(module, str(place)) == value for place, value in reads if place.attributes != ("training",)
        )
        return same and all(holds(place, frozen) for place, frozen in made.dependencies.held.items())
    except (AttributeError, Unfreezable):
        return False


@contextlib.contextmanager
def _in_its_mode(module: nn.Module, captured: Captured) -> Iterator[None]:
    """Let the module be in the mode, and around it what was around, when the call was captured.

    Whether weights want gradients decides which of its ways torch's attention takes; that is no difference to show.
    """
    around = contextlib.nullcontext() if captured.ambient is None else captured.ambient.active()
    own = {
        name: each for name, each in module.named_parameters() if name in captured.dependencies.flags and each.is_leaf
    }
    before = {name: each.requires_grad for name, each in own.items()}
    with unchanged_modes(module), around:
        for place, value in captured.dependencies.read.items():
            if place.attributes == ("training",):
                with contextlib.suppress(AttributeError):
                    module.get_submodule(place.path).training = value
        try:
            for name, each in own.items():
                each.requires_grad_(captured.dependencies.flags[name])
            yield
        finally:
            for name, each in own.items():
                each.requires_grad_(before[name])


def _filled(leaf: object, captured: Captured) -> object:
    """Return an empty tensor on the device of the capture for a stub of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    given = (each.device for each in captured.inputs if isinstance(each, TensorInput) and each.device is not None)
    device = next(given, torch.device("cpu"))
    return torch.empty_like(leaf, device=device).requires_grad_(leaf.requires_grad)


# -- as a whole


def _graph(model: nn.Module, captures: Mapping[str, Captured], blocks: _Blocks | None = None) -> Graph:
    """Return the graph of a model: its own, or that of its blocks and of the modules around them, in model order."""
    blocks = blocks or _Blocks(model)
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    if isinstance(model, fx.GraphModule):
        nodes, weights = placed(statements_of(model.graph, model), model, "")
    covered = [""] if isinstance(model, fx.GraphModule) else list(captures)
    for path, captured in captures.items():
        module = model.get_submodule(path)
        try:
            found, read = placed(blocks.statements(path, captured), module, path)
        except NotCaptured:
            covered.remove(path)
            continue
        start = len(nodes)
        nodes += (replace(node, inputs=tuple(start + i for i in node.inputs)) for node in found)
        weights |= read
    for node, read in _modules(model, covered):
        nodes.append(node)
        weights |= read
    parameters = list(model.parameters())
    total = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    return Graph(type(model).__name__, tuple(nodes), weights, *total)


def _modules(model: nn.Module, covered: Sequence[str]) -> Iterator[tuple[Statement, dict[str, Weight]]]:
    """Yield a statement for every module without children outside of the covered paths, and for every adapter."""
    inside = set(covered)
    for path, module in model.named_modules():
        if not path or "lora_" in path or path.endswith(HOME) or _is_covered(path, inside):
            continue
        adapters = list(attached_to(module))
        for adapter in adapters:
            own = adapter.home is adapter.owner
            name = path.rpartition(".")[2] if own else adapter.spec.parameter
            code = f"{name}(x) + {name}.lora_B({name}.lora_A(x) * {adapter.spec.scaling})"
            site = path if own else dotted(path, adapter.spec.parameter)
            yield _statement(module, path, site, code, describe_spec(adapter.spec), called_flops(module, adapter.spec))
        if not adapters and next(module.children(), None) is None:
            yield _statement(
                module, path, path, _summary(path.rpartition(".")[2], module), "", called_flops(module, None)
            )


def _is_covered(path: str, covered: set[str]) -> bool:
    parts = path.split(".")
    return "" in covered or any(".".join(parts[: end + 1]) in covered for end in range(len(parts)))


def _statement(
    module: nn.Module, path: str, site: str, code: str, rule: str, flops: int
) -> tuple[Statement, dict[str, Weight]]:
    weights = {dotted(path, name): each for name, each in weights_in(module).items()}
    kind = original_class(module).__name__
    return Statement(site, kind, "", escaped(code), weights=tuple(weights), rule=rule, flops=flops), weights


def _summary(name: str, module: nn.Module) -> str:
    return f"{name}(x)" if isinstance(module, nn.Linear) else f"{name}: {type(module).__name__}({module.extra_repr()})"
