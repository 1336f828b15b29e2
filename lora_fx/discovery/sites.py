"""The sites of a model: every weight that multiplies an activation, found in a module tree or in a graph."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.attach import HOME, is_adapted
from lora_fx.discovery.tables import biases_in, tables_in
from lora_fx.discovery.weight_uses import NOTHING_SHOWN, Uses, WeightUse
from lora_fx.errors import RefusedError
from lora_fx.models.code import refuse_odd_names
from lora_fx.models.collecting import collected_later
from lora_fx.models.dtypes import name_of_dtype
from lora_fx.models.joining import outline, refuse_unjoinable
from lora_fx.models.layers import KnownModule, LayerKind, in_eight_bits, known_modules, site_shape
from lora_fx.models.packed import PackedWeight, values_in
from lora_fx.models.tensors import dotted
from lora_fx.models.ties import ties
from lora_fx.models.twin import refuse_lazy
from lora_fx.models.walking import all_names_of, buffers_in, modules_of, parameters_in
from lora_fx.models.wrappers import holds_peft, seen_through
from lora_fx.models.zero import partitioned
from lora_fx.passes.rawsites import GraphUse, computed_uses, raw_uses
from lora_fx.passes.sites import site_calls
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory
from lora_fx.planning.sites import Site

UNKNOWN_USE = "a raw parameter: how it is used shows only with example_inputs"


@collected_later()
def take_inventory(model: nn.Module, uses: Uses | None = None) -> Inventory:
    """Return the sites and modules of a model; it stays unchanged, and needs no values (the meta device will do).

    What a run of the model has shown of its weights is in `uses`, if it could run.

    Raises:
        RefusedError: for a model that is adapted already, compiled or scripted.
    """
    refuse_unfit(model)
    model, in_graph = outline(model), None
    if isinstance(model, fx.GraphModule):
        placed = tuple(_graph_sites(model))
        sites, in_graph = tuple(site for site, _ in placed), frozenset(site.path for site, inside in placed if inside)
    else:
        sites = tuple(_Finder(model, uses or NOTHING_SHOWN).sites())
    named = all_names_of(model)
    numbers = values_in(model)

    def count(part: nn.Module) -> int:
        total = 0
        for parameter in parameters_in(modules_of(part) if part._modules else (part,)):
            total += numbers.get(id(parameter), parameter.numel())
        return total

    modules = tuple([(path, count(module)) for path, module in named])
    total, tables = count(model), tuple(tables_in(model))
    return Inventory(type(model).__name__, sites, modules, total, in_graph, tables, biases_in(model))


def refuse_unfit(model: nn.Module) -> None:
    """Raise RefusedError for a model that cannot be adapted at all.

    It is lazy, adapted already, scripted, compiled, sharded otherwise than by fully_shard, or has a GraphModule whose
    names Python misreads.
    """
    if is_adapted(model):
        advice = (
            'lora_fx.add(model, …, adapter="b") puts another adapter beside, from rules or a folder; '
            "lora_fx.remove(model) or lora_fx.merge(model) gives a model without any"
        )
        raise RefusedError("the model is adapted already", advice=advice)
    if isinstance(model, torch.jit.ScriptModule):
        raise RefusedError("a TorchScript model cannot be adapted", advice="adapt the nn.Module it was made from")
    if seen_through(model) is not model:
        compiled = "_orig_mod" in model._modules
        kind = "a compiled model" if compiled else f"a model inside of {type(model).__name__}"
        advice = f"adapt the model first, then {'torch.compile' if compiled else 'wrap'} it"
        raise RefusedError(f"{kind} cannot be adapted", advice=advice)
    refuse_unjoinable(model)
    if lost := partitioned(model):
        raise RefusedError("ZeRO-3 holds the parameters of this model", lost[:8], "lora_fx.apply before deepspeed does")
    if peft := holds_peft(model):
        raise RefusedError(
            "the model holds adapters of PEFT",
            [(path, "is a layer of PEFT") for path in peft[:8]],
            "merge_and_unload() folds them in; lora_fx.load reads their files",
        )
    refuse_lazy(model)
    for module in modules_of(model):
        if isinstance(module, fx.GraphModule):  # its code calls another module than its graph says: torch.fx's doing
            refuse_odd_names(module.graph)


def uses_in(plan: Plan) -> Uses | None:
    """Return what a run of the model has shown, as far as a plan tells; None if it was made without one."""
    sites = [planned.site for planned in plan.sites]
    if all(site.calls is None for site in sites):
        return None
    weights = {
        site.weight: WeightUse(site.op, site.layout, site.calls, site.outside, flat=len(site.shape) == 2)
        for site in sites
        if site.calls
    }
    return Uses({site.path: site.calls or 0 for site in sites}, weights)


def uses_in_graph(graph_module: fx.GraphModule, path: str = "") -> dict[str, WeightUse]:
    """Return how a graph uses raw parameters, by their names below `path`."""
    seen: dict[str, list[GraphUse]] = {}
    for use in (*raw_uses(graph_module), *computed_uses(graph_module)):
        if use.op:
            seen.setdefault(use.parameter, []).append(use)
    weights = {}
    for name, uses in seen.items():
        layouts = [use.layout for use in uses if use.layout is not None]
        ops = Counter(use.op for use in uses)
        op = "experts" if "experts" in ops else ops.most_common(1)[0][0]
        weights[dotted(path, name)] = WeightUse(op, layouts[0] if layouts else "out_in", len(uses), False)
    return weights


def class_names(kind: type) -> tuple[str, ...]:
    """Return a class's names as rules may write them: `Linear` and `torch.nn.modules.linear.Linear`."""
    return (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")


class _Finder:
    """Finds the sites of a module tree, in model order."""

    def __init__(self, model: nn.Module, uses: Uses) -> None:
        self.model = model
        self.ties = ties(model)
        self.uses = uses

    def sites(self) -> Iterator[Site]:
        for known in known_modules(self.model):
            path, module, kind = known.names[0], known.module, known.kind
            if kind is not None:
                yield self._layer(known, kind)
            if isinstance(module, nn.utils.parametrize.ParametrizationList):  # shown where its weight is used
                continue
            if (
                kind is not None and kind.refusal is not None and not self.uses.complete
            ):  # what its weight is computed from
                continue
            for name, parameter in module._parameters.items():
                if parameter is None or (name == "weight" and kind is not None):
                    continue
                if raw := self._used(dotted(path, name), parameter, known.raw.get(name)):
                    yield self._raw(known, name, raw)

    def _tied_to(self, parameter: Tensor | None, own: Collection[str]) -> tuple[str, ...]:
        return tuple(name for name in self.ties.get(id(parameter), ()) if name not in own)

    def _layer(self, known: KnownModule, kind: LayerKind) -> Site:
        """Return the site of a layer that is known by class."""
        (path, *aliases), module = known.names, known.module
        own = {dotted(name, "weight") for name in known.names}
        use = self.uses.weights.get(dotted(path, "weight"))
        fits = kind.packed and kind.refusal is None
        stored = _first_tensor(module)  # a parametrized `weight` would run its power iteration
        return Site(
            path=path,
            op=kind.op,
            classes=class_names(type(module)),
            shape=kind.shape,
            dtype=_dtype_name(PackedWeight(module) if fits else module.weight if stored is None else stored),
            bias=getattr(module, "bias", None) is not None,
            calls=self._calls(path, kind, use),
            aliases=tuple(aliases),
            tied_to=self._tied_to(module._parameters.get("weight"), own),
            refusal=kind.refusal or (use.problem or None if use is not None else None),
            layout=kind.layout,
            read=not kind.called or (use is not None and use.outside),
            outside=use is not None and use.outside,
        )

    def _calls(self, path: str, kind: LayerKind, use: WeightUse | None) -> int | None:
        if not self.uses.complete:
            return None
        number, called = 0 if use is None else use.calls, self.uses.calls.get(path, 0)
        return max(number, called) if kind.called else number or called  # a forward of its own may hide the product

    def _used(self, name: str, parameter: Tensor, known: LayerKind | None) -> LayerKind | None:
        """Return what a run has shown of a raw parameter, or what its owner's class does with it."""
        use, stored = self.uses.weights.get(name), tuple(parameter.shape)
        if use is None:
            looked_at = self.uses.complete or name in self.uses.looked_at
            if known is None and not looked_at and parameter.dim() >= 2 and min(stored[-2:]) > 1:
                return LayerKind("matmul", "out_in", stored, False, UNKNOWN_USE)
            return known
        if known is not None and known.op in ("attention", "linear"):
            return known
        op = "matmul" if use.op == "other" else use.op
        shape = (stored[0], math.prod(stored[1:])) if use.flat else stored
        problem = use.problem or _odd_shape(parameter, op, use.flat) or None
        return LayerKind(op, use.layout, site_shape(shape, op, use.layout), False, problem)

    def _raw(self, known: KnownModule, name: str, kind: LayerKind) -> Site:
        """Return the site of a raw parameter."""
        (path, *shared), module = known.names, known.module
        parameter = module._parameters[name]
        assert parameter is not None
        full = dotted(path, name)
        use = self.uses.weights.get(full)
        aliases = tuple(dotted(owner, name) for owner in shared)
        others = (path if name == "weight" else "", *(dotted(path, other) for other in kind.aliases))
        return Site(
            path=full,
            op=kind.op,
            classes=class_names(type(module)),
            shape=kind.shape,
            dtype=_dtype_name(parameter),
            calls=use.calls if use is not None else (0 if self.uses.complete else None),
            aliases=tuple(alias for alias in (*others, *aliases) if alias),
            tied_to=self._tied_to(parameter, (full, *aliases)),
            refusal=kind.refusal or _taken_name(module, name),
            parameter=full,
            layout=kind.layout,
            read=True,
            outside=use is not None and use.outside,
        )

    def weight_in_graph(self, path: str) -> Site:
        """Return the site of a weight that a graph reads from a module that is not a layer."""
        owner = self.model.get_submodule(path)
        weight = owner._parameters["weight"]
        assert weight is not None
        return Site(
            path=path,
            op="linear",
            classes=class_names(nn.Linear),
            shape=tuple(weight.shape),
            dtype=_dtype_name(weight),
            bias=owner._parameters.get("bias") is not None,
            tied_to=self._tied_to(weight, (f"{path}.weight",)),
        )


def _first_tensor(module: nn.Module) -> Tensor | None:
    """Return the first parameter in a module, or, where it has none, the first buffer."""
    own: list[Tensor | None] = [*module._parameters.values()]
    own += [] if module._modules else [*module._buffers.values()]
    for tensor in own:
        if tensor is not None:
            return tensor
    inside = modules_of(module)
    return next(iter((*parameters_in(inside), *buffers_in(inside))), None)


def _odd_shape(parameter: Tensor, op: str, flat: bool) -> str:
    if parameter.dim() == 1:
        return "a vector has no low rank; train it whole (`train:` its module)"
    if parameter.dim() > 3 and not flat and not op.startswith("conv"):
        return f"a weight of {parameter.dim()} dimensions is not supported"
    if not parameter.is_floating_point():
        return f"a weight of dtype {_dtype_name(parameter)} is not supported"
    return in_eight_bits(parameter)


def _taken_name(module: nn.Module, name: str) -> str | None:
    if name != "weight" and name + HOME in (*vars(module), *module._modules, *module._parameters, *module._buffers):
        return f"its adapter would be kept as {name}{HOME}, a name that the module uses itself"
    return None


def _dtype_name(tensor: Tensor | nn.Module) -> str:
    assert isinstance(tensor, Tensor)
    return name_of_dtype(tensor.dtype)


def _graph_sites(graph_module: fx.GraphModule) -> Iterator[tuple[Site, bool]]:
    """Yield the sites of a graph in its order, then those inside modules that it calls as a whole; whether it is one
    of the graph's own.
    """
    finder = _Finder(graph_module, replace(NOTHING_SHOWN, weights=uses_in_graph(graph_module)))
    calls = Counter(path for path, _ in site_calls(graph_module) if path)
    in_modules = {site.path: site for site in finder.sites()}
    for path, number in calls.items():
        site = in_modules.get(path) or finder.weight_in_graph(path)
        yield replace(site, calls=number), True
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for site in in_modules.values():
        if site.parameter in read:
            if site.calls or site.refusal not in (None, UNKNOWN_USE):
                yield replace(site, read=False), True
        elif site.path not in calls:
            yield site, False
