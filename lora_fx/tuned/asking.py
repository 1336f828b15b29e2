"""GraphModules whose adapters stand in their graphs, node by node: layers take over before anything is chosen."""

from collections.abc import Iterator

from torch import fx, nn

from lora_fx.adapters.attach import SWITCH
from lora_fx.models.between import between_calls, unchanged
from lora_fx.models.restoring import all_or_nothing
from lora_fx.models.walking import modules_of
from lora_fx.passes.ask import Ask, in_nodes, not_asking
from lora_fx.passes.contract import rewrite


def ask_layers(tuned: nn.Module) -> None:
    """Let the layers of GraphModules add what is used of their adapters, in place of nodes in their graphs, in place.

    The values stay, and outputs up to rounding.  Calls in other threads end before, or begin after it; then each has
    choices of its own.

    Raises:
        RefusedError: something has its adapter in a graph and nowhere else; nothing is changed then.
    """
    if _is_apply_s(tuned):
        return
    with unchanged(tuned):  # another thread may be at it
        found = list(_with_nodes(tuned))
    if not found:
        return
    with between_calls(tuned, found):
        found = [one for one in found if in_nodes(one)]
        for graph_module in found:
            Ask().requires(graph_module)
        with all_or_nothing(modules_of(tuned), graphs=True):
            for graph_module in found:
                rewrite(graph_module, Ask())


def can_ask(tuned: nn.Module) -> bool:
    """Whether `ask_layers` would refuse nothing."""
    return not any(not_asking(graph_module) for graph_module in _with_nodes(tuned))


def _is_apply_s(tuned: nn.Module) -> bool:
    """Whether `apply` has made it of no GraphModule: it writes nodes into nothing else."""
    return not isinstance(tuned, fx.GraphModule) and SWITCH in tuned.__dict__


def _with_nodes(tuned: nn.Module) -> Iterator[fx.GraphModule]:
    """Yield the GraphModules in a model that have adapters in their graphs."""
    for module in () if _is_apply_s(tuned) else tuned.modules():
        if isinstance(module, fx.GraphModule) and in_nodes(module):
            yield module
