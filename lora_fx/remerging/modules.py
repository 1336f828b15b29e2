"""Modules of other libraries that are a linear and its LoRA: found by their shapes, proven by their graph."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.adapters.factors.kinds import Convolution
from lora_fx.capture.captured import NotCaptured, capture
from lora_fx.models.layers import has_hooks
from lora_fx.models.samples import Sample
from lora_fx.models.tensors import set_tensor
from lora_fx.models.twin import make_twin
from lora_fx.remerging.algebra.chains import Affine, MatrixChain, WeightPart, refolded, with_chains
from lora_fx.remerging.algebra.folds import check_product, find_folds
from lora_fx.remerging.algebra.operations import NotLinear
from lora_fx.remerging.algebra.read import read_graph
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.running import close, finite, made_up_rows
from lora_fx.text import dotted

_ROWS = ((2, 3), (5,))
"""The dimensions in front of the columns of inputs that are made up."""
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def candidates(model: nn.Module) -> list[str]:
    """Return the paths of modules whose parameters may be one weight and factors of low rank, the innermost first."""
    hidden = _of_graphs(model)
    paths = [
        path
        for path, module in model.named_modules()
        if path not in hidden and type(module).forward is not nn.Module.forward and _weight_of(module) is not None
    ]
    return sorted(paths, key=lambda path: -len(path.split(".")) if path else 1)


def _of_graphs(model: nn.Module) -> set[str]:
    """Return the paths of GraphModules and of what is in them, apart from what their graphs call as a whole."""
    hidden: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            used = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
            whole = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}
            inner = {name for name, _ in module.named_modules() if name} - whole
            hidden |= {path} | {dotted(path, name) for name in inner}
    return hidden


def matrices_of(module: nn.Module) -> list[Tensor]:
    """Return the module's weights, and those of the module that has taken over its forward."""
    other = _bound_elsewhere(module)
    weights = dict.fromkeys((*module.parameters(), *(() if other is None else other.parameters())))
    return [weight for weight in weights if weight.dim() > 1 and weight.is_floating_point() and weight.numel()]


def _bound_elsewhere(module: nn.Module) -> nn.Module | None:
    """Return the module whose method has taken the place of this one's forward."""
    forward = vars(module).get("forward")
    owner = forward.__self__ if isinstance(forward, MethodType) else None
    return owner if isinstance(owner, nn.Module) and owner is not module else None


def _flat(module: nn.Module) -> list[Tensor]:
    """Return `matrices_of` with two dimensions; those of convolutions in groups as wide as if they had one."""
    holders = [module, *filter(None, [_bound_elsewhere(module)])]
    groups = {
        id(inner.weight): inner.groups
        for holder in holders
        for inner in holder.modules()
        if isinstance(inner, Convolution)
    }
    flat = [(weight.detach().flatten(1), groups.get(id(weight), 1)) for weight in matrices_of(module)]
    return [weight.repeat(1, times) if times > 1 else weight for weight, times in flat]


def _weight_of(module: nn.Module) -> Tensor | None:
    """Return the weight that the others of a module may be factors for, if there are such.

    The one large matrix among thinner ones; or, where there are several, one that fits two factors which the module
    itself owns, as a forward that computes a LoRA on the way does.
    """
    stored = matrices_of(module)
    matrices = _flat(module)
    if len(matrices) < 3:
        return None
    weight = max(matrices, key=torch.numel)
    if all(min(other.shape) < min(weight.shape) for other in matrices if other is not weight):
        return weight
    # a wrapper has a linear and two factors, whatever holds them
    own = {id(held) for held in module._parameters.values() if held is not None and held.dim() == 2}
    fitting = [one for one, held in zip(matrices, stored, strict=True) if len(stored) == 3 or id(held) in own]
    for one in matrices:
        if _has_pair(one, [other for other in fitting if other is not one]):
            return one
    return None


def _has_pair(weight: Tensor, others: list[Tensor]) -> bool:
    """Whether two of the matrices lead from the weight's one dimension to fewer than the larger of the two, and on to
    its other: the LoRA of a head with few outputs has more ranks than those.
    """
    out, into = weight.shape
    sizes = Counter(tuple(sorted(other.shape)) for other in others)
    ranks = {rank for size in sizes for rank in size if rank < max(into, out)}
    return any(Counter(tuple(sorted((rank, side))) for side in (into, out)) <= sizes for rank in ranks)


# -- one candidate


def replaced(model: nn.Module, path: str, call: Sample | None) -> nn.Module | str:
    """Return the plain layer that computes what the module at the path computes, or why there is none.

    An empty reason: it does not look like a LoRA at all.
    """
    module = model.get_submodule(path)
    weight = _weight_of(module)
    if weight is None:  # what is inside has become plain
        return ""
    is_pair = _has_pair(weight, [other for other in _flat(module) if other.shape != weight.shape])
    unfit = _unfit(module)
    if unfit is not None:
        return unfit if is_pair else ""
    convolutions = [inner for inner in module.modules() if isinstance(inner, Convolution)]
    reason = ""
    for width in dict.fromkeys((weight.shape[1], weight.shape[0])):
        inputs = _made_up(convolutions, weight, width)
        if call is not None:
            inputs.insert(0, (call.args, call.kwargs))
        try:
            read = read_module(module, *inputs[0])
        except NotCaptured as failure:
            reason = f"its forward is not captured: {failure}"
            continue
        try:
            layer = _plain_layer(model, path, read, width, is_pair)
        except NotLinear as why:
            return _what_it_looks_like(read, why)
        return _disagreement(module, layer, inputs) or layer
    return reason if is_pair else ""


def _unfit(module: nn.Module) -> str | None:
    if has_hooks(module):
        return "it has hooks"
    if any(isinstance(inner, nn.Embedding) for inner in module.modules()):
        return "its base is an embedding, no linear"
    return None


def _made_up(convolutions: Sequence[Convolution], weight: Tensor, width: int) -> Calls:
    """Return calls of a linear with so many columns, or of the convolution that has a weight of this size."""
    base = next((conv for conv in convolutions if conv.weight.numel() * conv.groups == weight.numel()), None)
    if base is None:
        return [((made_up_rows(rows, (width,), weight),), {}) for rows in _ROWS]
    spans = [d * (k - 1) for d, k in zip(base.dilation, base.kernel_size, strict=True)]
    sizes = [tuple(span + more for span in spans) for more in (3, 4)]
    return [((made_up_rows((2, base.in_channels), size, weight),), {}) for size in sizes]


def read_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphReading:
    """Return the module's forward for such a call, as a graph that can be read; the module stays unchanged.

    Raises:
        NotCaptured: with the reason.
    """
    if any("forward" in vars(inner) for inner in module.modules()):
        return _read_operations(module, args, kwargs)
    return read_graph(module, capture(module, args, kwargs).graph)


def _read_operations(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphReading:
    """Trace below the Python of a forward that lives in another object, where no copy of the module can follow."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for owner in filter(None, map(_bound_elsewhere, module.modules())):
        theirs = {id(parameter): name for name, parameter in owner.named_parameters()}
        names = {key: f"({type(owner).__name__}).{name}" for key, name in theirs.items()} | names
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = make_fx(lambda *given: module(*given, **kwargs), pre_dispatch=True)(*args)
    except Exception as error:
        raise NotCaptured(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    return read_graph(traced, traced.graph, names)


def result_of(read: GraphReading) -> fx.Node:
    """Return the node whose value the graph returns; NotLinear is raised where it returns more than one tensor."""
    output = next(node for node in read.graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        raise NotLinear(output, "it returns more than one tensor")
    return read.latest(output.args[0], output)


def _plain_layer(model: nn.Module, path: str, read: GraphReading, width: int, is_pair: bool) -> nn.Module:
    """Return a plain layer for a module whose forward is exactly W x + bias + Σ scaling · B A x.

    Raises:
        NotLinear: its forward is something else.
    """
    x = next(node for node in read.graph.nodes if node.op == "placeholder")
    node = result_of(read)
    value = read.affine(node, x, width)
    bases = [(chain, part) for chain, part in value.parts() if _is_whole(read, part)]
    products = [chain for chain in value.linear if all(chain is not base for base, _ in bases)]
    if len(bases) != 1:
        raise NotLinear(node, "")
    if products or not is_pair:  # without products: they are switched off, or merged already
        check_product(products, node)
    module = model.get_submodule(path)
    check_factors(model, module, read, products)
    return _with_weights(module, read, bases[0][1], value, products)


def _is_whole(read: GraphReading, part: WeightPart) -> bool:
    shape = read.tensors[part.name].shape
    return part.start == 0 and part.stop == shape[0 if part.transposed else 1]


def check_factors(model: nn.Module, module: nn.Module, read: GraphReading, products: Iterable[MatrixChain]) -> None:
    """Raise NotLinear if a factor serves a module outside of this one too."""
    factors = _factors(read, products)
    own = set(map(id, module.modules()))
    for path, other in model.named_modules():
        held = (*other._parameters.values(), *other._buffers.values())
        if id(other) not in own and any(id(tensor) in factors for tensor in held):
            raise NotLinear(None, f"a factor is used elsewhere too ({path})")


def _factors(read: GraphReading, products: Iterable[MatrixChain]) -> set[int]:
    """Return the stored matrices of the products, by identity."""
    tensors = [read.tensors[name] for chain in products for name in chain.names]
    return {id(tensor) for tensor in tensors if tensor.dim() > 1}


def _with_weights(
    module: nn.Module, read: GraphReading, part: WeightPart, value: Affine, products: list[MatrixChain]
) -> nn.Module:
    """Return the module's base layer with new weights; an nn.Linear, where the weight is the module's own."""
    stored = read.tensors[part.name]
    weight = nn.Parameter(refolded(stored, part.transposed, products), requires_grad=stored.requires_grad)
    old, bias = _bias(read, part, value)
    if not finite([weight, *([] if bias is None else [bias])]):
        raise NotLinear(None, "the folded weight has NaN or infinite values")
    inside = _base_layer(module, stored, _factors(read, products))
    if inside is not None:
        return _changed(inside, {id(stored): weight, id(old): bias})
    plain = weight if part.transposed else nn.Parameter(weight.t().contiguous(), requires_grad=weight.requires_grad)
    return _linear(plain, bias, module.training) if plain.dim() == 2 else _convolution(module, plain, bias)


def _bias(read: GraphReading, part: WeightPart, value: Affine) -> tuple[Tensor | None, Tensor | None]:
    """Return the stored bias and the one with what the products bring along; the same, if they bring nothing."""
    rows = {chain.part.name: chain for chain in value.constant if chain.part is not None}
    beside = [name for name in rows if name.rpartition(".")[0] == part.name.rpartition(".")[0]]
    # a factor's own bias is a row as well: the base's stands beside the weight
    name = next(iter((*beside, *rows)), None)
    extra = [chain for chain in value.constant if name is None or chain is not rows[name]]
    if name is None:
        if extra:
            raise NotLinear(None, "it adds a bias to a linear that has none")
        return None, None
    old = read.tensors[name]
    new = with_chains(old.unsqueeze(1), extra).squeeze(1)
    return old, nn.Parameter(new, requires_grad=old.requires_grad) if extra else old


def _base_layer(module: nn.Module, stored: Tensor, factors: set[int]) -> nn.Module | None:
    """Return the outermost submodule that holds the weight and none of the factors, if there is one."""
    if _bound_elsewhere(module) is not None:
        return None
    for inner in list(module.modules())[1:]:
        held = set(map(id, inner.parameters()))
        if id(stored) in held and not held & factors and type(inner).forward is not nn.Module.forward:
            return inner
    return None


def _changed(layer: nn.Module, new: dict[int, Tensor | None]) -> nn.Module:
    """Return a copy of the layer with other tensors in place of some; all others are the same objects."""
    twin = make_twin(layer, freeze=False)
    for name, old in layer.named_parameters(remove_duplicate=False):
        tensor = new.get(id(old), old)
        assert tensor is not None
        set_tensor(twin, name, tensor)
    return twin


def _linear(weight: nn.Parameter, bias: Tensor | None, training: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return layer.train(training)


def _convolution(module: nn.Module, weight: nn.Parameter, bias: Tensor | None) -> nn.Module:
    """Return a convolution whose forward others have taken over as it was, with new parameters."""
    if not isinstance(module, Convolution):
        raise NotLinear(None, "no module in it is its convolution alone; remerge the graph of a model that holds it")
    layer = copy.copy(module)
    layer.__dict__["_parameters"] = {**module._parameters, "weight": weight, "bias": bias}
    layer.__dict__.pop("forward", None)
    return layer


def _disagreement(module: nn.Module, layer: nn.Module, inputs: Calls) -> str:
    """Return why the layer cannot stand for the module; empty if both compute the same for all inputs."""
    if any(parameter.is_meta for parameter in layer.parameters()):
        return ""
    compared = 0
    with torch.no_grad():
        for args, kwargs in inputs:
            try:
                expected = module(*args, **kwargs)
            except Exception:  # inputs that are made up need not suit the module
                continue
            try:
                computed = layer(*args, **kwargs)
            except TypeError:
                return "the plain layer cannot be called as the layer is"
            if computed.dtype != expected.dtype or not close(computed, expected, expected.dtype):
                return "the folded layer gives something else"
            compared += 1
    return "" if compared else "it cannot be called to compare"


def _what_it_looks_like(read: GraphReading, why: NotLinear) -> str:
    """Return why a LoRA in a module's graph is left alone; nothing where there is none."""
    if why.node is None:
        return why.reason
    findings = find_folds(read)
    more = "its forward does more than a linear and its LoRA; remerge the graph of a model that holds it"
    return next(iter(findings.left.values()), more if findings.folds else "")
