"""The one object that changes a graph, and the journal it keeps."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx, nn

from lora_fx.models.code import refuse_odd_names
from lora_fx.models.tensors import dotted, set_tensor

EditKind = Literal["add node", "erase node", "replace uses", "add module", "drop module", "set weight", "drop weight"]


@dataclass(frozen=True, slots=True)
class Edit:
    """One change: what was done, to which node, module or weight, for which site, by which pass."""

    kind: EditKind
    what: str
    site: str
    by: str


@dataclass(slots=True)
class Journal:
    """Every edit, in order.  `modified` is derived from it, never declared."""

    edits: list[Edit] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        return bool(self.edits)

    def count(self, kind: EditKind) -> int:
        return sum(edit.kind == kind for edit in self.edits)

    def __str__(self) -> str:
        return "\n".join(f"{edit.by}: {edit.kind} {edit.what} ({edit.site})" for edit in self.edits)


class Editor:
    """Changes one GraphModule, and writes down what it does."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.journal = Journal()
        self.passes: list[str] = []
        """Names of the passes that have run on the graph; the last is running."""

    def _note(self, kind: EditKind, what: str, site: str) -> None:
        self.journal.edits.append(Edit(kind, what, site, self.passes[-1] if self.passes else ""))

    # -- nodes

    @contextlib.contextmanager
    def writing_after(self, node: fx.Node, site: str) -> "Iterator[Writer]":
        """Yield what writes nodes after `node`, in the order of writing; they inherit its place in the module tree."""
        following, writer = node.next, Writer(self.graph)
        with self.graph.inserting_before(following):  # inserting_after would put successive nodes in reverse
            yield writer
        new = node.next
        while new is not following:
            new.meta.update({key: value for key, value in node.meta.items() if key in ("place", "nn_module_stack")})
            new.meta["site"] = site
            self._note("add node", new.name, site)
            writer.added.append(new)
            new = new.next

    def replace(self, old: fx.Node, new: fx.Node, site: str) -> None:
        """Put `new` in the place of `old`, with what is known of its value, and erase `old`."""
        new.meta.update(old.meta)
        self.replace_uses(old, new, site)
        self.erase(old, site)

    def replace_uses(
        self, old: fx.Node, new: fx.Node, site: str, but: Callable[[fx.Node], bool] = lambda user: False
    ) -> None:
        """Let every user of `old` use `new`, except those for which `but` holds."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: not but(user), propagate_meta=False)
        self._note("replace uses", f"{old.name} by {new.name}", site)

    def replace_operand(self, node: fx.Node, old: fx.Node, new: fx.Node, site: str) -> None:
        """Let one node use `new` where it used `old`."""
        node.replace_input_with(old, new)
        self._note("replace uses", f"an operand of {node.name}", site)

    def erase(self, node: fx.Node, site: str) -> None:
        self.graph.erase_node(node)
        self._note("erase node", node.name, site)

    # -- modules and weights

    def change_modules(self, path: str, change: Callable[[nn.Module], Any], site: str) -> None:
        """Let `change` put modules into the module at `path`, or take some away."""
        owner = self.graph_module.get_submodule(path)
        before = dict(owner.named_modules())
        change(owner)
        after = dict(owner.named_modules())
        for name in before | after:
            if name not in before or name not in after:
                self._note("drop module" if name in before else "add module", dotted(path, name), site)

    def set_tensor(self, name: str, tensor: Tensor, site: str) -> None:
        """Put a tensor in place of the parameter or buffer of that name; other holders of the old one keep it."""
        set_tensor(self.graph_module, name, tensor)
        self._note("set weight", name, site)

    def drop_tensor(self, name: str, site: str) -> None:
        """Take a parameter or buffer away."""
        path, _, last = name.rpartition(".")
        delattr(self.graph_module.get_submodule(path), last)
        self._note("drop weight", name, site)

    def drop_module(self, path: str, site: str) -> None:
        """Take a module away."""
        self.graph_module.delete_submodule(path)
        self._note("drop module", path, site)

    def finish(self) -> None:
        """Check and recompile the graph, once."""
        if self.journal.modified:
            self.graph.lint()
            refuse_odd_names(self.graph)
            self.graph_module.recompile()


class Writer:
    """Writes nodes by computing with proxies: the mathematics is written once, in `adapters`, and run here."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.added: list[fx.Node] = []
        """What has been written, once it is."""
        self._tracer = fx.proxy.GraphAppendingTracer(graph)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return fx.Proxy(node, self._tracer)

    def attribute(self, path: str) -> fx.Proxy:
        """Write a read of the parameter at the path, and return it."""
        return self.proxy(self.graph.get_attr(path))

    def module(self, path: str) -> Callable[..., Any]:
        """Return a function that writes a call of the module at the path."""

        def call(*args: fx.Proxy, **kwargs: fx.Proxy | None) -> fx.Proxy:
            keywords: dict[str, Any] = {n: None if value is None else value.node for n, value in kwargs.items()}
            return self.proxy(self.graph.call_module(path, tuple(arg.node for arg in args), keywords))

        return call
