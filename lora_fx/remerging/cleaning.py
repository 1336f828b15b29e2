"""What is left of a product that was folded: nodes nobody reads, parameters nobody names, modules nobody calls."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from lora_fx.models.tensors import attribute_at, dotted
from lora_fx.passes.editor import Editor
from lora_fx.remerging.algebra.operations import is_linear, parameters_read


def erase_unread(editor: Editor, candidates: Iterable[fx.Node], site: str) -> list[fx.Node]:
    """Erase those of the nodes that nobody reads any more, the last first; return them."""
    wanted, erased = set(candidates), []
    for node in reversed(list(editor.graph.nodes)):
        if node in wanted and not node.users and node.op not in ("placeholder", "output"):
            editor.erase(node, site)
            erased.append(node)
    return erased


def drop_unused(editor: Editor, tensors: Iterable[Tensor], called: Iterable[str], site: str) -> None:
    """Take away those of the tensors that the graph needs no more, and the modules and containers that are then empty.

    Args:
        editor: of the graph.
        tensors: parameters and buffers that may go.
        called: paths of modules that may go.
        site: for the journal.
    """
    root, wanted, owners = editor.graph_module, {id(tensor) for tensor in tensors}, set(called)
    used = _used(root, editor.graph)
    for path, module in list(root.named_modules()):
        for name in [*module._parameters, *module._buffers]:
            full = dotted(path, name)
            if id(attribute_at(root, full)) in wanted and full not in used:
                editor.drop_tensor(full, site)
                owners.add(path)
    for path in sorted(owners, key=len, reverse=True):
        while path and not _is_needed(root, path, used):
            editor.drop_module(path, site)
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
    kept = [each for table in (module._parameters, module._buffers) for each in table.values() if each is not None]
    return bool(kept or module._modules)
