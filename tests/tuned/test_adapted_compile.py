"""torch.compile and torch.export of adapted real models: no more graph breaks than the base, the same outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.peers import (
    BERT,
    DIT,
    LARGE,
    LLAMA,
    QUICK,
    T5,
    VIT,
    Peer,
    adapted,
    assert_close,
    counts,
    each,
    gradients,
    pair,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's and transformers' own, while they trace
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_with(peer: Peer, model: nn.Module) -> tuple[torch.Tensor, int]:
    """Return what the compiled model computes, and how often the compiler had to go back to Python."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        result = peer.call(compiled)
    return result, sum(torch._dynamo.utils.counters["graph_break"].values())


@each((LLAMA, VIT), slow=(BERT,), fuzz=(DIT, *LARGE))
def test_compiled_model_has_no_more_graph_breaks_than_its_base_and_the_same_output(peer: Peer):
    graph, modules = pair(peer)
    _, allowed = compiled_with(peer, peer.build())
    result, compiled = compiled_with(peer, graph)
    assert compiled <= allowed
    assert_close(result, peer.call(modules))


def test_compiled_model_is_one_graph_at_every_size():
    graph, modules = pair(BERT)
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    with torch.no_grad():
        for shape in ((3, 7), (2, 5), (4, 9)):
            assert_close(BERT.call(compiled, *shape), BERT.call(modules, *shape))
    before = counts(graph)
    BERT.call(graph)
    assert counts(graph)[0] > before[0], "called without the compiler it still runs as graphs"


@each((DIT,), slow=(BERT,))
def test_gradients_of_a_compiled_model_are_those_of_the_module_backend(peer: Peer):
    graph, modules = pair(peer)
    compiled = torch.compile(graph, backend="aot_eager")
    result, expected = peer.call(compiled), peer.call(modules)
    assert_close([result, *gradients(graph, result)], [expected, *gradients(modules, expected)])


@each(QUICK, slow=LARGE)
def test_exported_model_has_the_adapter_and_computes_what_the_model_computes(peer: Peer):
    tuned = adapted(peer)
    given = peer.inputs(3, 7) | ({"use_cache": False} if peer in (LLAMA, T5) else {})
    with torch.no_grad():
        program = torch.export.export(tuned, (), given)
        assert_close(program.module()(**given)[0], tuned(**given)[0])
    factors = [name for name in program.state_dict if ".lora_A." in name or ".lora_B." in name]
    assert len(factors) == 2 * len(lora_fx.inspect(tuned).sites)


def test_count_of_graph_breaks_sees_one():
    class Breaking(nn.Module):
        def forward(self, input_ids, attention_mask):
            torch._dynamo.graph_break()
            return (input_ids + attention_mask,)

    assert compiled_with(BERT, Breaking())[1] == 1
