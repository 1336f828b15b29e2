"""verify: what must hold of every adapted model, as a list; run after every pass under test and on demand."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.errors import InvariantError
from lora_fx.passes.ask import in_nodes
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.rawsites import raw_uses
from lora_fx.passes.sites import lora_nodes, site_calls

Problem = tuple[str, str]


def verify(model: nn.Module) -> None:
    """Check every invariant of an adapted model; it stays unchanged.

    Raises:
        InvariantError: with (path, reason) for every invariant that does not hold.
    """
    problems = [problem for check in INVARIANTS for problem in check(model)]
    if problems:
        raise InvariantError("the adapted model is not as it must be", problems)


@dataclass(frozen=True, slots=True)
class Verify(Pass):
    """`verify` as a pass: changes nothing."""

    name: str = "verify"

    def run(self, editor: Editor) -> None:
        verify(editor.graph_module)


def _shapes_fit(model: nn.Module) -> Iterator[Problem]:
    for path, adapter in all_attached(model):
        out_r, r_in = tuple(adapter.lora_B.matrix.shape), tuple(adapter.lora_A.matrix.shape)
        site = adapter.spec.site
        bank, (out_features, in_features) = site.shape[: int(site.is_banked)], site.features
        if out_r != (*bank, out_features, adapter.spec.rank) or r_in != (*bank, adapter.spec.rank, in_features):
            wanted = f"r={adapter.spec.rank}, {in_features} → {out_features}"
            yield path, f"lora_B {out_r} · lora_A {r_in} does not fit {wanted}"


def _devices_agree(model: nn.Module) -> Iterator[Problem]:
    for path, adapter in all_attached(model):
        devices = {str(p.device) for p in (adapter.base_weight, adapter.lora_A.weight, adapter.lora_B.weight)}
        if len(devices) > 1:
            yield path, f"weight, lora_A and lora_B are on {', '.join(sorted(devices))}"


def _no_parameter_twice(model: nn.Module) -> Iterator[Problem]:
    factors = [(path, factor.weight) for path, f in all_attached(model) for factor in (f.lora_A, f.lora_B)]
    uses = Counter(id(weight) for _, weight in factors)
    for path, weight in factors:
        if uses[id(weight)] > 1:
            yield path, "shares a factor's parameter with another site"


def _adapters_are_trainable(model: nn.Module) -> Iterator[Problem]:
    for path, adapter in all_attached(model):
        is_frozen, asks = adapter.spec.lora.lora_fa, adapter.lora_A.weight.requires_grad
        if not adapter.lora_B.weight.requires_grad or not (asks or is_frozen):
            yield path, "its factors do not require a gradient"
        elif asks and is_frozen:
            yield path, "its factor A requires a gradient, and LoRA-FA freezes it"


def _targets_exist(model: nn.Module) -> Iterator[Problem]:
    try:
        if isinstance(model, fx.GraphModule):
            model.graph.lint()
    except RuntimeError as error:
        yield "(graph)", str(error)


def _every_call_is_adapted(model: nn.Module) -> Iterator[Problem]:
    if not isinstance(model, fx.GraphModule):
        return
    subgraphs = list(lora_nodes(model))
    written = Counter(subgraph.path for subgraph in subgraphs)
    own = {node for subgraph in subgraphs for node in subgraph.between if node is not subgraph.result}
    calls = Counter(path for path, _ in site_calls(model))
    calls += Counter(use.parameter for use in raw_uses(model) if use.node not in own)
    for path in dict.fromkeys(path for path, _ in in_nodes(model)):
        if written[path] != calls[path]:
            yield path, f"{calls[path]} calls in the graph, {written[path]} of them adapted"


def _results_are_used(model: nn.Module) -> Iterator[Problem]:
    for subgraph in lora_nodes(model) if isinstance(model, fx.GraphModule) else ():
        if not subgraph.result.users:
            yield subgraph.path, "the adapted output is not used"


INVARIANTS: tuple[Callable[[nn.Module], Iterator[Problem]], ...] = (
    _shapes_fit,
    _devices_agree,
    _no_parameter_twice,
    _adapters_are_trainable,
    _targets_exist,
    _every_call_is_adapted,
    _results_are_used,
)
