"""GraphModules whose adapters stand in their graphs, node by node: layers take over before anything is chosen."""

import threading
from collections.abc import Iterator

from torch import fx, nn

from lora_fx.adapters.attach import SWITCH
from lora_fx.models.between import between_calls
from lora_fx.models.restoring import all_or_nothing
from lora_fx.passes.ask import Ask, in_nodes, not_asking
from lora_fx.passes.contract import rewrite


def ask_layers(tuned: nn.Module) -> None:
    """Let the layers of GraphModules add what is used of their adapters, in place of nodes in their graphs, in place.

    The values stay, and outputs up to rounding.  Calls in other threads end before, or begin after it; then each has
    choices of its own.

    Raises:
        RefusedError: something has its adapter in a graph and nowhere else; nothing is changed then.
    """
    with _ASKING:
        found = list(_with_nodes(tuned))
        for graph_module in found:
            Ask().requires(graph_module)
        if found:
            with between_calls(tuned, found), all_or_nothing(tuned, graphs=True):
                for graph_module in found:
                    rewrite(graph_module, Ask())


_ASKING = threading.Lock()


def can_ask(tuned: nn.Module) -> bool:
    """Whether `ask_layers` would refuse nothing."""
    return not any(not_asking(graph_module) for graph_module in _with_nodes(tuned))


def _with_nodes(tuned: nn.Module) -> Iterator[fx.GraphModule]:
    """Yield the GraphModules in a model that have adapters in their graphs."""
    if not isinstance(tuned, fx.GraphModule) and SWITCH in tuned.__dict__:
        return  # `apply` writes nodes into nothing but a GraphModule that it is given
    for module in tuned.modules():
        if isinstance(module, fx.GraphModule) and in_nodes(module):
            yield module
