"""inject: at every adapted site, base → base + scaling · B A dropout(x), written node by node."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from lora_fx.adapters.attach import Attached, attach, attached_to, is_adapted, record_of, shown_parameters, spec_of
from lora_fx.adapters.dicts import unspeakable
from lora_fx.adapters.factors.lora import add_low_rank, as_rows
from lora_fx.adapters.factors.spec import ModelRecord
from lora_fx.errors import RefusedError
from lora_fx.models.packed import held_weight, is_packed
from lora_fx.models.tensors import dotted
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor, Writer
from lora_fx.passes.rawsites import factors_in, raw_uses, splice_raw
from lora_fx.passes.sites import LINEARS, first_argument, site_calls
from lora_fx.passes.verify import verify
from lora_fx.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Inject(Pass):
    """Adapt the sites that a plan adapts.  Ensures: base keys kept; bit-equal while B = 0."""

    plan: Plan
    record: ModelRecord | None = None
    """What the adapters shall carry with them; made from the graph module if not given."""
    name: str = "inject"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if is_adapted(graph_module):
            raise RefusedError("the model is adapted already", advice="lora_fx.remove or lora_fx.merge it before")
        taken = [(name, "is an attribute of nn.ModuleDict") for name in self.plan.adapters if unspeakable(name)]
        if taken:
            advice = 'give the adapter another name; or backend="modules", which leaves the graph as it is'
            raise RefusedError("the code of a GraphModule cannot name these adapters", taken, advice)
        coded = [(path, "DoRA") for path in self._dora() if is_packed(graph_module.get_submodule(path))]
        if coded:
            raise RefusedError("the graph of a GraphModule reads codes here, of which no length is taken", coded)
        used = {use.parameter for use in raw_uses(graph_module)}
        dropped = [
            (planned.path, f"DoRA, dropout {planned.lora.dropout:g}")
            for planned in self.plan.adapted
            if planned.lora is not None and planned.lora.dora and planned.lora.dropout and planned.path in used
        ]
        if dropped:
            advice = 'leave out `dropout`, or give backend="modules"'
            raise RefusedError("in a graph DoRA computes these weights as a whole, without a dropout", dropped, advice)

    def _dora(self) -> Iterator[str]:
        """Yield the paths of the modules that get an adapter with lengths."""
        sites = (site for site in self.plan.adapted if site.lora is not None and site.lora.dora)
        return (site.site.owner for site in sites)

    def run(self, editor: Editor) -> None:
        record = self.record or record_of(self.plan, editor.graph_module)
        called = {path for path, _ in site_calls(editor.graph_module)}
        called |= {use.parameter for use in raw_uses(editor.graph_module)}
        for decision in self.plan.adapted:
            if decision.path in called:
                owner = editor.graph_module.get_submodule(decision.site.owner)
                spec = spec_of(decision, record, held_weight(owner, decision.site.weight.rpartition(".")[2]))
                editor.change_modules(decision.site.owner, functools.partial(attach, spec=spec), decision.path)
        splice_adapters(editor)
        splice_raw(editor)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        verify(graph_module)


def splice_adapters(editor: Editor, to_show: bool = False) -> None:
    """Write the LoRA nodes of every attached adapter after each call of its base.

    A layer that shows its weight with the adapter in it needs no nodes; `to_show`, it gets them all the same.
    """
    met: Counter[str] = Counter()
    for path, call in list(site_calls(editor.graph_module)):
        owner = editor.graph_module.get_submodule(path)
        wanted = not shown_parameters(owner) or (to_show and call.op == "call_module")
        adapters = [adapter for adapter in attached_to(owner) if adapter.home is adapter.owner] if wanted else []
        if adapters:
            # only now: the site that makes the input may have been adapted just before
            _splice(editor, path, call, first_argument(call), adapters[min(met[path], len(adapters) - 1)])
            met[path] += 1


def splice_layer(editor: Editor) -> None:
    """Write the LoRA nodes of the adapter beside a layer whose own forward the graph is."""
    x = next(node for node in editor.graph.nodes if node.op == "placeholder")
    for adapter in attached_to(editor.graph_module):
        result = next(node for node in editor.graph.nodes if node.op == "output").args[0]
        assert isinstance(result, fx.Node)
        _splice(editor, "", result, x, adapter)


def _splice(editor: Editor, path: str, call: fx.Node, x: fx.Node, adapter: Attached) -> None:
    spec, name = adapter.spec, adapter.spec.adapter
    number = "" if adapter.call is None else f".{adapter.call}"
    with editor.writing_after(call, path) as write:
        result = add_low_rank(
            write.proxy(call),  # type: ignore[arg-type]
            write.proxy(x),  # type: ignore[arg-type]
            A=write.module(dotted(path, f"lora_A.{name}{number}")),
            B=write.module(dotted(path, f"lora_B.{name}{number}")),
            dropout=write.module(dotted(path, f"lora_dropout.{name}")) if adapter.dropout is not None else None,
            magnitude=_magnitude(write, path, call, adapter) if adapter.magnitude is not None else None,
            scaling=spec.scaling,
            mixed=spec.mixed,
            one_hot=spec.site.op == "embedding",
        )
    added: fx.Node = result.node  # type: ignore[attr-defined]
    own = {user for user in call.users if user is added or user.meta.get("site") == path}
    editor.replace_uses(call, added, path, but=lambda user: user in own)


def _magnitude(write: Writer, path: str, call: fx.Node, adapter: Attached) -> Callable[[Any, Any], Any]:
    """Return a function that writes the call of DoRA's magnitude with the tensors that it needs."""
    weight = as_rows(write.attribute(dotted(path, "weight")), adapter.spec.site.layout)
    bias = _bias(write, path, call, adapter)
    A, B = factors_in(write, adapter, path)
    magnitude = write.module(dotted(path, f"lora_magnitude_vector.{adapter.spec.adapter}"))
    return functools.partial(magnitude, weight=weight, bias=bias, lora_A=A, lora_B=B)


def _bias(write: Writer, path: str, call: fx.Node, adapter: Attached) -> fx.Proxy | None:
    """Return the bias in the base's output: that of the layer, or what F.linear was given beside its weight."""
    if call.target not in LINEARS:
        return None if adapter.owner._parameters.get("bias") is None else write.attribute(dotted(path, "bias"))
    given = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    if not isinstance(given, fx.Node):
        return None
    return write.attribute(str(given.target)) if given.op == "get_attr" else write.proxy(given)
