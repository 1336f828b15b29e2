"""The contract of passes: what each requires and ensures is checked around it, wherever it stands in a list."""

from __future__ import annotations

import pytest
from torch import fx

from lora_fx import passes
from lora_fx.errors import InvariantError, RefusedError
from lora_fx.passes.inject import Inject
from lora_fx.passes.remove import Remove
from lora_fx.passes.verify import Verify
from tests.passes.test_passes import plan_for, traced


class BreaksItsPromise(passes.Pass):
    name = "breaks"

    def run(self, editor: passes.Editor) -> None:
        pass

    def ensures(self, graph_module: fx.GraphModule) -> None:
        raise InvariantError("something is left", [("fc1", "left")])


def test_promise_is_checked_after_every_pass_and_the_error_names_those_that_ran_before():
    graph = traced()
    before = graph.code, list(graph.state_dict())
    with pytest.raises(InvariantError, match="something is left") as caught:
        passes.run(graph, [Inject(plan_for(graph)), Verify(), BreaksItsPromise(), Remove()])
    assert "  in the pass breaks, after inject, verify" in caught.value.__notes__
    assert (graph.code, list(graph.state_dict())) == before


def test_requirement_is_checked_before_every_pass_and_the_error_names_those_that_ran_before():
    graph = traced()
    with pytest.raises(RefusedError, match="no adapter to remove") as caught:
        passes.run(graph, [Inject(plan_for(graph)), Remove(), Remove()])
    assert "  in the pass remove, after inject, remove" in caught.value.__notes__


def test_a_pass_needs_a_run_and_nothing_else():
    class Nothing(passes.Pass):
        name = "nothing"

        def run(self, editor: passes.Editor) -> None:
            pass

    assert not passes.run(traced(), [Nothing()]).modified
    with pytest.raises(TypeError, match="abstract"):
        type("Idle", (passes.Pass,), {"name": "idle"})()
