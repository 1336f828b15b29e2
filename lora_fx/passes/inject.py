"""inject: at every adapted site, base → base + scaling · B A dropout(x), written node by node."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lora_fx.adapters.attach import Attached, attach, attached, base_weight_name, is_adapted
from lora_fx.adapters.lora import add_low_rank
from lora_fx.adapters.spec import AdapterSpec, ModelRecord
from lora_fx.editor import Editor, Writer
from lora_fx.errors import RefusedError
from lora_fx.passes.sitegraph import SiteCall, first_argument, site_calls
from lora_fx.passes.verify import verify
from lora_fx.planning import Plan
from lora_fx.records import record_of, spec_of
from lora_fx.tensors import dotted


@dataclass(frozen=True, slots=True)
class Inject:
    """Adapt the sites that a plan adapts.  Ensures: base keys kept; bit-equal while B = 0."""

    plan: Plan
    record: ModelRecord | None = None
    """What the adapters shall carry with them; made from the graph module if not given."""
    name: str = "inject"

    def requires(self, graph_module: fx.GraphModule) -> None:
        if is_adapted(graph_module):
            raise RefusedError("the model is adapted already", advice="lora_fx.remove or lora_fx.merge it before")

    def run(self, editor: Editor) -> None:
        record = self.record or record_of(self.plan, editor.graph_module)
        called = {call.path for call in site_calls(editor.graph_module)}
        for each in self.plan.adapted:
            if each.path in called:
                spec = spec_of(each, record, editor.graph_module)
                editor.add_modules(each.path, functools.partial(_attach, shape=each.shape, spec=spec), each.path)
        splice_adapters(editor)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        verify(graph_module)


def _attach(owner: nn.Module, shape: tuple[int, ...], spec: AdapterSpec) -> None:
    weight = owner._parameters["weight"]
    assert weight is not None
    attach(owner, weight, shape, spec)


def splice_adapters(editor: Editor, only: set[str] | None = None) -> None:
    """Write the LoRA nodes of every attached adapter (of the paths in `only`) after each call of its base."""
    for call in list(site_calls(editor.graph_module)):
        found = attached(editor.graph_module.get_submodule(call.path))
        if found is not None and (only is None or call.path in only):
            _splice(editor, call, found)


def _splice(editor: Editor, call: SiteCall, found: Attached) -> None:
    spec, name = found.spec, found.spec.adapter
    x = first_argument(call.node)  # only now: the site that makes it may have been adapted just before
    with editor.writing_after(call.node, call.path) as write:
        result = add_low_rank(
            write.proxy(call.node),  # type: ignore[arg-type]
            write.proxy(x),  # type: ignore[arg-type]
            A=write.module(dotted(call.path, f"lora_A.{name}")),
            B=write.module(dotted(call.path, f"lora_B.{name}")),
            dropout=write.module(dotted(call.path, f"lora_dropout.{name}")) if found.dropout is not None else None,
            magnitude=_magnitude(write, call.path, found) if found.magnitude is not None else None,
            scaling=spec.scaling,
            mixed=spec.mixed,
        )
    added: fx.Node = result.node  # type: ignore[attr-defined]
    own = {user for user in call.node.users if user is added or user.meta.get("site") == call.path}
    editor.replace_uses(call.node, added, call.path, but=lambda user: user in own)


def _magnitude(write: Writer, path: str, found: Attached) -> Callable[[Any, Any], Any]:
    """Return a function that writes the call of DoRA's magnitude with the tensors that it needs."""
    name = found.spec.adapter
    bias = None if found.owner._parameters.get("bias") is None else write.attribute(dotted(path, "bias"))
    tensors = {
        "weight": write.attribute(dotted(path, base_weight_name(found.owner))),
        "bias": bias,
        "lora_A": write.attribute(dotted(path, f"lora_A.{name}.weight")),
        "lora_B": write.attribute(dotted(path, f"lora_B.{name}.weight")),
    }
    return functools.partial(write.module(dotted(path, f"lora_magnitude_vector.{name}")), **tensors)
