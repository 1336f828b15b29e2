"""Models as Graphs: blocks statement by statement where a graph of them is known, everything else module by module."""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from lora_fx.adapters.attach import HOME, all_attached, attached_to, is_adapted
from lora_fx.adapters.dicts import unspeakable
from lora_fx.adapters.factors.spec import AdapterSpec
from lora_fx.adapters.trained import VALUES
from lora_fx.capture.calls.arguments import rebuild
from lora_fx.capture.captured import Captured, NotCaptured, capture
from lora_fx.capture.reads.frozen import Freezer, Frozen, OfType, Unfreezable
from lora_fx.capture.reads.places import AttributePath
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.discovery.study import CAPTURING, observed
from lora_fx.graphdiff.canonical import Statements, adapted_graph, describe_spec, placed, statements_of
from lora_fx.graphdiff.costs import called_flops, totals, weights_in
from lora_fx.graphdiff.diff import GraphDiff, compare
from lora_fx.graphdiff.graphs import Graph, Statement, Weight, escaped
from lora_fx.graphdiff.programs import graph_of_program, load_program
from lora_fx.models.layers import is_layer
from lora_fx.models.samples import samples_for
from lora_fx.models.swap import original_class
from lora_fx.models.tensors import attribute_at, dotted
from lora_fx.models.twin import make_twin
from lora_fx.progress.steps import step
from lora_fx.regions.candidates import structure_of
from lora_fx.regions.install import regions
from lora_fx.regions.survey import survey, unchanged_modes

Comparable: TypeAlias = nn.Module | ExportedProgram | Graph | str | os.PathLike[str]


def graph_diff(a: Comparable, b: Comparable, example_inputs: object = None, trust: bool = False) -> GraphDiff:
    """Return how the graphs of two models differ, grouped by site; both models stay unchanged.

    Blocks that either model runs as graphs are compared statement by statement; what lies outside of them is compared
    module by module.  GraphModules, exported programs and saved graphs are compared as they are.

    Args:
        a: a model, an exported program, a graph, or a `.pt2` or `.json` file.
        b: what it is compared with.
        example_inputs: as for `lora_fx.plan`; for models neither of which runs as graphs.
        trust: that reading a `.pt2` file may run code.
    """
    if (
        isinstance(a, nn.Module)
        and isinstance(b, nn.Module)
        and not all(isinstance(side, fx.GraphModule) for side in (a, b))
    ):
        return compare(*_pair(a, b, example_inputs))
    return compare(graph_of(a, example_inputs, trust), graph_of(b, example_inputs, trust))


def graph_of(model: Comparable, example_inputs: object = None, trust: bool = False) -> Graph:
    """Return the graph of a model, of an exported program, or of a `.pt2` or `.json` file; nothing is changed.

    Raises:
        GraphFileError: a file holds no graph.
        ProgramFileError: a file is a program and not trusted, or holds none that this torch can read.
    """
    if isinstance(model, Graph):
        return model
    if isinstance(model, ExportedProgram):
        return graph_of_program(model, type(model).__name__)
    if isinstance(model, nn.Module):
        return _graph(_Blocks(model), {} if isinstance(model, fx.GraphModule) else _own_captures(model, example_inputs))
    path = Path(model)
    return graph_of_program(load_program(path, trust), path.name) if path.suffix == ".pt2" else Graph.load(path)


def _pair(a: nn.Module, b: nn.Module, example_inputs: object) -> tuple[Graph, Graph]:
    """Return the graphs of two models, each block captured for one and the same call."""
    captures = _own_captures(a, example_inputs)
    others = _own_captures(b, example_inputs)
    captures |= {path: captured for path, captured in others.items() if path not in captures}
    both = {path for path, _ in a.named_modules()} & {path for path, _ in b.named_modules()}
    sides = _Blocks(a), _Blocks(b)
    shared = {
        path: captured
        for path, captured in captures.items()
        if path in both and all(side.statements(path, captured) is not None for side in sides)
    }
    return _graph(sides[0], shared), _graph(sides[1], shared)


def _own_captures(model: nn.Module, example_inputs: object) -> dict[str, Captured]:
    """Return a captured graph for every region of the model; without regions, if it is a base, for what inputs show."""
    captures = {}
    for path, module, region in regions(model):
        own = (program.captured for program in region.mine or region.block.programs)
        fitting = next((one for one in own if _reads_the_same(module, one, one)), None)  # blocks may share captures
        if fitting is not None and not is_layer(module):  # a layer is shown as a module
            captures[path] = fitting
    shown = captures or example_inputs is None or is_adapted(model)  # of modules, if that has left it no region
    return captures if shown else _surveyed(model, example_inputs)


def _surveyed(model: nn.Module, example_inputs: object) -> dict[str, Captured]:
    with step(total=1 + CAPTURING):
        seen = observed(model, samples_for(model, example_inputs))
        with step(total=10, share=CAPTURING):
            study = survey(make_twin(seen.model), seen.samples, [site.path for site in seen.inventory.sites])
    programs = {path: study.library.get(study.structures[path], []) for path in study.graphs}
    return {path: known[0][0] for path, known in programs.items() if known}


@dataclass(slots=True)
class _Blocks:
    """The statements of a model's blocks; identical blocks are captured and written once."""

    model: nn.Module
    known: dict[Any, list[tuple[Captured, Statements] | None]] = field(default_factory=dict)
    """By structure and call; None: it cannot be captured."""

    def statements(self, path: str, captured: Captured) -> Statements | None:
        """Return the statements of the block at a path for the call of `captured`, which may be another model's.

        None if the block cannot be captured for that call, or no statement has room for its adapters: then its modules
        are compared.
        """
        module = self.model.get_submodule(path)
        if _has_several(module) or any(unspeakable(one.spec.adapter) for _, one in all_attached(module)):
            return None  # a statement has one adapter, by its name
        known = self.known.setdefault((structure_of(module), id(captured)), [])
        for block in known:
            if block is None or _reads_the_same(module, block[0], captured):
                return None if block is None else block[1]
        try:
            own = self._captured(path, module, captured)
        except NotCaptured:
            known.append(None)
            return None
        statements = statements_of(adapted_graph(own.graph, module), module)
        known.append((own, statements))
        return statements

    def _captured(self, path: str, module: nn.Module, captured: Captured) -> Captured:
        """Return the capture itself where it is the block's own and fits, else one of the same call."""
        kinds = [region.block for place, _, region in regions(self.model) if place == path]
        mine = any(program.captured is captured for kind in kinds for program in kind.programs)
        if (mine and not captured.parameters) or captured.example is None:
            return captured
        args, kwargs = rebuild(*captured.example, lambda leaf: _filled(leaf, captured))
        with _in_its_mode(module, captured):
            return capture(module, args, kwargs)


def _reads_the_same(module: nn.Module, made: Captured, wanted: Captured) -> bool:
    """Whether the module holds what a capture of an identical one relied on, but for the numbers of layers."""
    freezer = Freezer({id(child): path for path, child in module.named_modules()})

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
    """Put the module in the mode, and the ambient state around it, in which the call was captured.

    Whether weights require gradients decides which path torch's attention takes; that is not a difference to show.
    """
    around = contextlib.nullcontext() if captured.ambient is None else captured.ambient.active()
    flags = captured.dependencies.flags
    own = {name: leaf for name, leaf in module.named_parameters() if name in flags and leaf.is_leaf}
    before = {name: parameter.requires_grad for name, parameter in own.items()}
    with unchanged_modes(module), around:
        for place, value in captured.dependencies.read.items():
            if place.attributes == ("training",):
                with contextlib.suppress(AttributeError):
                    module.get_submodule(place.path).training = value
        try:
            for name, parameter in own.items():
                parameter.requires_grad_(flags[name])
            yield
        finally:
            for name, parameter in own.items():
                parameter.requires_grad_(before[name])


def _filled(leaf: object, captured: Captured) -> object:
    """Return an empty tensor on the device of the capture for a stub of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    devices = (given.device for given in captured.inputs if isinstance(given, TensorInput) and given.device is not None)
    device = next(devices, torch.device("cpu"))
    return torch.empty_like(leaf, device=device).requires_grad_(leaf.requires_grad)


# -- as a whole


def _graph(blocks: _Blocks, captures: Mapping[str, Captured]) -> Graph:
    """Return the graph of a model: its own, or that of its blocks and of the modules around them, in model order."""
    model = blocks.model
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    covered: set[str] = set()
    if isinstance(model, fx.GraphModule):
        nodes, weights = placed(statements_of(model.graph, model), model, "")
        covered = {""}
    for path, captured in captures.items():
        statements = blocks.statements(path, captured)
        if statements is not None:
            block, read = placed(statements, model.get_submodule(path), path)
            start = len(nodes)
            nodes += (replace(node, inputs=tuple(start + i for i in node.inputs)) for node in block)
            weights |= read
            covered.add(path)
    for node, read in _modules(model, covered):
        nodes.append(node)
        weights |= read
    return Graph(type(model).__name__, tuple(nodes), weights, *totals(model.parameters()))


def _modules(model: nn.Module, covered: Collection[str]) -> Iterator[tuple[Statement, dict[str, Weight]]]:
    """Yield a statement for every module without children outside of the covered paths, and for every adapter."""
    for path, module in model.named_modules():
        if not path or "lora_" in path or path.endswith(HOME) or _is_covered(path, covered):
            continue
        adapters, several = list(attached_to(module)), _has_several(module)
        for adapter in adapters:
            own = adapter.home is adapter.owner
            name = path.rpartition(".")[2] if own else adapter.spec.parameter
            before = (
                ""
                if adapter is not adapters[0] and adapter.spec.parameter == adapters[0].spec.parameter
                else f"{name}(x)"
            )
            of = f".{adapter.spec.adapter}" if several else ""
            code = f"{before} + {name}.lora_B{of}({name}.lora_A{of}(x) * {adapter.spec.scaling})".lstrip()
            yield _statement(module, path, path if own else dotted(path, name), code, adapter.spec)
        if not adapters and all(name == VALUES for name, _ in module.named_children()):
            yield _statement(module, path, path, _summary(path.rpartition(".")[2], module), None)


def _has_several(block: nn.Module) -> bool:
    """Whether a weight in the block has more than one adapter."""
    names = {(id(one.owner), one.spec.parameter, one.spec.adapter) for _, one in all_attached(block)}
    return len({name[:2] for name in names}) < len(names)


def _is_covered(path: str, covered: Collection[str]) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:end]) in covered for end in range(len(parts) + 1))


def _statement(
    module: nn.Module, path: str, site: str, code: str, spec: AdapterSpec | None
) -> tuple[Statement, dict[str, Weight]]:
    weights = {dotted(path, name): weight for name, weight in weights_in(module).items()}
    kind, rule = original_class(module).__name__, "" if spec is None else describe_spec(spec)
    flops = called_flops(module, spec)
    return Statement(site, kind, "", escaped(code), weights=tuple(weights), rule=rule, flops=flops), weights


def _summary(name: str, module: nn.Module) -> str:
    return f"{name}(x)" if isinstance(module, nn.Linear) else f"{name}: {type(module).__name__}({module.extra_repr()})"
