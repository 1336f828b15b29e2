"""remerge of one graph: finds LoRAs of any library by their structure and folds them into their base weights."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from lora_fx.errors import InvariantError
from lora_fx.models.tensors import attribute_at, dotted
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.remerging.algebra.chains import refolded, with_chains
from lora_fx.remerging.algebra.checks import checked, names_of_weight, stored_as
from lora_fx.remerging.algebra.folds import LoraFold, find_folds
from lora_fx.remerging.algebra.operations import IDENTITY, is_assertion, is_linear, parameters_read
from lora_fx.remerging.algebra.read import read_graph
from lora_fx.remerging.algebra.reading import GraphReading
from lora_fx.remerging.algebra.running import finite, problem_with


@dataclass(frozen=True, slots=True)
class Remerge(Pass):
    """Fold every product of low rank that is added to a linear of the same input, or to its weight.

    W' = W + Σ scaling · B A, accumulated in float32 and rounded once, in a new parameter: other holders of W keep it.
    What looks like a LoRA and cannot be folded is left alone.  Ensures: what was folded is in no graph and no module.
    """

    folded: list[str] = field(default_factory=list)
    """Filled by `run`: where the weights stand that took up a product."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """Filled by `run`: (path, reason) of what was left alone."""
    name: str = "remerge"

    def run(self, editor: Editor) -> None:
        while True:  # a product in a sum may become visible when one in the weight is gone
            read = read_graph(editor.graph_module, editor.graph)
            folds, left = _to_fold(read)
            if not folds:
                break
            _fold(editor, read, folds)
            self.folded.extend(fold.path for fold in folds if fold.path not in self.folded)
        self.left.extend(left.items())

    def ensures(self, graph_module: fx.GraphModule) -> None:
        folds, _ = _to_fold(read_graph(graph_module, graph_module.graph))
        if folds:
            missed = {fold.path: "still there" for fold in folds}
            raise InvariantError("a product that can be folded is still in the graph", list(missed.items()))


def _to_fold(read: GraphReading) -> tuple[list[LoraFold], dict[str, str]]:
    """Return the folds to do, in the order of the graph, and what is left alone and why."""
    findings = find_folds(read)
    left = findings.left
    for fold in findings.folds:  # only what computes what its structure says
        reason = problem_with(read, fold)
        if reason is not None:
            left[fold.path] = reason
    provable = [fold for fold in findings.folds if fold.path not in left]
    folds = sorted(checked(read, provable, left), key=lambda fold: read.order[fold.use])
    for own in _by_use(folds):
        if not finite([_weight_of(read, own), *_bias_of(read, own)]):
            left[own[0].path] = "the folded weight has NaN or infinite values"
    return [fold for fold in folds if fold.path not in left], left


def _by_use(folds: list[LoraFold]) -> list[list[LoraFold]]:
    """Return the folds of each linear together."""
    together: dict[fx.Node, list[LoraFold]] = {}
    for fold in folds:
        together.setdefault(fold.use, []).append(fold)
    return list(together.values())


def _fold(editor: Editor, read: GraphReading, folds: list[LoraFold]) -> None:
    names = {fold.use: min(names_of_weight(read, fold)) for fold in folds if fold.delta is None}
    for name, (tensor, path) in _new_tensors(read, folds).items():
        editor.set_tensor(name, tensor, path)
    called = {str(node.target) for fold in folds for node in fold.cone if node.op == "call_module"}
    _take_out(editor, read, folds, names)
    _drop_unused(editor, {id(read.tensors[name]) for fold in folds for name in fold.factors}, called)


# -- weights


def _new_tensors(read: GraphReading, folds: list[LoraFold]) -> dict[str, tuple[Tensor, str]]:
    """Return (tensor, path of the fold) for each stored name that gets new values."""
    new: dict[str, tuple[Tensor, str]] = {}
    for own in _by_use(folds):
        values = [_weight_of(read, own), *_bias_of(read, own)]
        for name in stored_as(read, own[0]):
            old = attribute_at(read.root, name)
            value = next(tensor for tensor in values if tensor.shape == old.shape)
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value, requires_grad=old.requires_grad)
            new.setdefault(name, (value, own[0].path))
    return new


def _weight_of(read: GraphReading, folds: list[LoraFold]) -> Tensor:
    """Return the stored weight with all products of one linear folded in."""
    part = folds[0].part
    total = read.tensors[part.name]
    for start in sorted({fold.part.start for fold in folds}):
        chains = [chain for fold in folds if fold.part.start == start for chain in fold.chains]
        total = refolded(total, part.transposed, chains, start)
    return total


def _bias_of(read: GraphReading, folds: list[LoraFold]) -> list[Tensor]:
    """Return the stored bias with what the products bring along added, if they bring any."""
    total: Tensor | None = None
    for fold in folds:
        if fold.bias is not None and fold.constants:
            total = read.tensors[fold.bias.name] if total is None else total
            total = with_chains(total.unsqueeze(1), fold.constants, fold.bias.start).squeeze(1)
    return [] if total is None else [total]


# -- nodes


def _take_out(editor: Editor, read: GraphReading, folds: list[LoraFold], names: dict[fx.Node, str]) -> None:
    """Let every sum be what it is without the products, and erase what computed them."""
    removal = _Removal(editor, read, {(fold.delta, fold.reader) for fold in folds})
    for node in list(read.graph.nodes):
        if node in read.calls and not read.is_constant(node):
            removal.visit(node)
    for fold in folds:
        if fold.delta is None:
            _read_weight_alone(editor, fold, names[fold.use])
    unread = {node for fold in folds for node in fold.cone} | removal.touched
    for node in reversed(list(editor.graph.nodes)):
        if node in unread and all(map(is_assertion, node.users)) and node.op not in ("placeholder", "output"):
            for erased in (*node.users, node):
                editor.erase(erased, "remerge")


class _Removal:
    """Takes addends out of sums, one sum after the other in the order of the graph."""

    def __init__(self, editor: Editor, read: GraphReading, addends: set[tuple[fx.Node | None, fx.Node | None]]) -> None:
        self.editor, self.read = editor, read
        self.addends = addends
        """Pairs of a value and the sum that must not have it: another sum may go on reading it."""
        self.gone: set[fx.Node] = set()
        """Sums of which nothing is left, and casts of them."""
        self.now: dict[fx.Node, fx.Node] = {}
        """What stands for a sum that has one addend left."""
        self.touched: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        call = self.read.calls[node]
        if call.op in ("add", "sub"):
            names = [name for name in ("input", "other") if isinstance(call.get(name), fx.Node)]
            kept = [name for name in names if not self._is_gone(self.read.given(call, name), node)]
            if len(kept) < len(names):
                self._keep(node, kept)
        elif call.op == IDENTITY and self.read.given(call) in self.gone:
            self.gone.add(node)
            self.touched.add(node)

    def _is_gone(self, value: fx.Node, reader: fx.Node) -> bool:
        return value in self.gone or (value, reader) in self.addends

    def _keep(self, node: fx.Node, kept: list[str]) -> None:
        """Let the readers of a sum read its other addend; if both are gone, so is the sum."""
        self.touched.add(node)
        if not kept:
            self.gone.add(node)
            return
        call = self.read.calls[node]
        other = self.now.get(self.read.given(call, kept[0]), call.arguments[kept[0]])
        self.now[node] = other
        readers = set(self.read.readers(node))
        for value in (node, call.arguments["input"]) if call.in_place else (node,):
            if value is not other:
                self.editor.replace_uses(value, other, "remerge", but=lambda user: user not in readers)


def _read_weight_alone(editor: Editor, fold: LoraFold, name: str) -> None:
    """Let the readers of W + B A read W."""
    with editor.writing_after(fold.use, fold.path) as write:
        weight = write.graph.get_attr(name)
        if fold.part.transposed:
            weight = write.graph.call_method("t", (weight,))
    editor.replace_uses(fold.use, weight, fold.path, but=lambda user: user is weight)


# -- what is left of a product: parameters that nothing names, modules that nothing calls


def _drop_unused(editor: Editor, tensors: set[int], called: Iterable[str]) -> None:
    """Take away those of the tensors that the graph needs no more, and the modules and containers that are then empty.

    Args:
        editor: of the graph.
        tensors: parameters and buffers that may go, by identity.
        called: paths of modules that may go.
    """
    root, owners = editor.graph_module, set(called)
    used = _used(root, editor.graph)
    for path, module in list(root.named_modules()):
        for name in [*module._parameters, *module._buffers]:
            full = dotted(path, name)
            if id(attribute_at(root, full)) in tensors and full not in used:
                editor.drop_tensor(full, "remerge")
                owners.add(path)
    for path in sorted(owners, key=len, reverse=True):
        while path and not _is_needed(root, path, used):
            editor.drop_module(path, "remerge")
            path = path.rpartition(".")[0]


def _used(root: nn.Module, graph: fx.Graph) -> set[str]:
    """Return the names of tensors that are read and of modules that are called, or are in one that is."""
    used: set[str] = set()
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            path = str(node.target)
            used.add(path)
        if node.op == "call_module":
            module = root.get_submodule(path)
            used |= {dotted(path, name) for name, _ in parameters_read(module)}
            if not is_linear(module):
                used |= {dotted(path, name) for name, _ in (*module.named_modules(), *module.named_buffers())}
    return used


def _is_needed(root: nn.Module, path: str, used: set[str]) -> bool:
    if path in used:
        return True
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return True  # gone already
    tensors = (*module._parameters.values(), *module._buffers.values())
    return bool(module._modules) or any(tensor is not None for tensor in tensors)
