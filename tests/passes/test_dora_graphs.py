"""DoRA in a user's own GraphModule: of layers, parts of a weight and raw parameters, node by node, and out again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx.adapters.attach import all_attached, owner_path
from lora_fx.errors import RefusedError
from lora_fx.passes.verify import verify
from tests.support.dorakinds import lengthened
from tests.support.zoo import randomise_

PARTS = {"of": ["q", "k", "v"], "adapt": ["v", "q"]}


def rules(**lora: object) -> dict:
    dora = {"r": 2, "dora": True, **lora}
    return {
        "rules": [
            {"match": {"name": name}, "lora": dora, "slices": PARTS, "expect": "any"} for name in ("qkv", "fused")
        ] + [{"match": {"name": "**"}, "lora": dora}]
    }  # fmt: skip


class Everything(nn.Module):
    """Layers of every kind, and raw parameters in every position."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * 0.5)

        self.words, self.tokens = nn.Embedding(7, 4), parameter(7, 4)
        self.first, self.second, self.qkv = parameter(6, 4), parameter(6, 5), parameter(15, 5)
        self.kernel, self.scaled = parameter(5, 1, 3), parameter(5, 5)
        self.conv, self.fused, self.last = nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.Linear(5, 15), nn.Linear(5, 5)
        self.requires_grad_(False)

    def forward(self, ids):
        x = F.linear(F.embedding(ids, self.tokens) + self.words(ids), self.first) @ self.second
        x = F.conv1d(self.conv(x.transpose(1, 2)), self.kernel, padding=1, groups=5).transpose(1, 2)
        q, _, v = self.qkv.chunk(3)
        x = F.linear(x, q) * F.linear(x, v) + self.fused(x).chunk(3, -1)[0]
        return self.last(torch.tanh(F.linear(x, self.scaled * 2) + torch.matmul(x, self.scaled)))


IDS = torch.arange(12).view(2, 6) % 7


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Everything())


def exported() -> nn.Module:
    return torch.export.export(Everything(), (IDS,)).module()


@pytest.fixture(params=[traced, exported], ids=["traced", "exported"])
def graph_module(request: pytest.FixtureRequest) -> fx.GraphModule:
    return request.param().requires_grad_(False)


def trained(graph_module: fx.GraphModule, **lora: object) -> fx.GraphModule:
    tuned = lora_fx.apply(graph_module, rules(**lora))
    randomise_(tuned)
    return tuned


def with_dense_weights(graph_module: fx.GraphModule, tuned: fx.GraphModule) -> fx.GraphModule:
    dense = copy.deepcopy(graph_module)
    for path, adapter in all_attached(tuned):
        owner = dense.get_submodule(owner_path(path, adapter))
        rows = [row for part in adapter.spec.parts for row in part] or None
        V = owner._parameters[adapter.spec.parameter] + adapter.delta()
        assert adapter.magnitude is not None
        whole = lengthened(V, adapter.magnitude.weight, adapter.spec.site.layout, rows)
        owner._parameters[adapter.spec.parameter] = nn.Parameter(whole.detach(), requires_grad=False)
    return dense


def test_graph_starts_bit_equal_to_its_base_and_verifies(graph_module):
    tuned = lora_fx.apply(graph_module, rules())
    assert isinstance(tuned, fx.GraphModule)
    assert len(list(all_attached(tuned))) == 10
    with torch.no_grad():
        assert torch.equal(tuned(IDS), graph_module(IDS))
    # torch takes another kernel for a matrix that requires a gradient
    torch.testing.assert_close(tuned(IDS), graph_module(IDS), rtol=1e-6, atol=1e-6)
    verify(tuned)


def test_graph_computes_what_the_weights_compute_and_gradients_reach_all(graph_module):
    tuned = trained(graph_module)
    expected = with_dense_weights(graph_module, tuned)(IDS)
    torch.testing.assert_close(tuned(IDS), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tuned(IDS), graph_module(IDS), atol=1e-3)
    tuned(IDS).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in lora_fx.parameters(tuned))


def test_merging_removing_and_switching_off_leave_the_graph_as_it_was(graph_module):
    tuned = trained(graph_module)
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(IDS), graph_module(IDS))
    merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
    torch.testing.assert_close(merged(IDS), tuned(IDS), rtol=1e-5, atol=1e-5)
    assert torch.equal(removed(IDS), graph_module(IDS))
    for plain in (merged, removed):
        assert not lora_fx.diff(plain, graph_module)
        assert list(plain.state_dict()) == list(graph_module.state_dict())


def test_pickled_graph_is_saved_loaded_merged_and_removed(tmp_path):
    tuned = trained(traced())
    again = pickle.loads(pickle.dumps(tuned))
    assert torch.equal(again(IDS), tuned(IDS))
    assert torch.equal(lora_fx.remove(again)(IDS), traced()(IDS))
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(lora_fx.load(traced(), tmp_path)(IDS), tuned(IDS))


def test_weight_of_a_raw_parameter_is_one_node():
    tuned = lora_fx.apply(traced(), rules())
    nodes = [(node.op, str(node.target)) for node in tuned.graph.nodes if node.meta.get("site") == "second"]
    assert nodes == [
        ("get_attr", "second_lora.lora_A.default.weight"),
        ("get_attr", "second_lora.lora_B.default.weight"),
        ("call_module", "second_lora.lora_magnitude_vector.default"),
    ]


def test_difference_to_the_base_tells_the_lengths():
    text = str(lora_fx.diff(traced(), trained(traced())))
    for path in ("second_lora", "conv.lora_magnitude_vector", "words.lora_magnitude_vector"):
        assert path in text


def test_half_precision_graph_gets_float32_lengths():
    half = fx.symbolic_trace(Everything().bfloat16())
    tuned = lora_fx.apply(half, rules())
    with torch.no_grad():
        assert torch.equal(tuned(IDS), half(IDS))
    assert {parameter.dtype for parameter in lora_fx.parameters(tuned)} == {torch.float32}
    assert torch.equal(lora_fx.remove(trained(half))(IDS), half(IDS))


class Headless(nn.Module):
    """F.linear with a layer's weight, and another bias than the layer's, or none."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.ones(4)) if bias else None

    def forward(self, x):
        return F.linear(x, self.lin.weight, self.shift)


@pytest.mark.parametrize("bias", [False, True])
def test_product_with_a_layers_weight_has_the_bias_that_it_is_given(bias: bool):
    torch.manual_seed(0)
    graph_module, x = fx.symbolic_trace(Headless(bias)), torch.randn(3, 4)
    tuned = trained(graph_module)
    torch.testing.assert_close(tuned(x), with_dense_weights(graph_module, tuned)(x))
    torch.testing.assert_close(lora_fx.merge(tuned)(x), tuned(x))
    assert torch.equal(lora_fx.remove(tuned)(x), graph_module(x))


def test_dropout_of_a_raw_parameter_is_refused_before_anything_is_changed():
    graph_module = traced()
    code = graph_module.code
    with pytest.raises(RefusedError, match="in a graph DoRA computes these weights as a whole") as caught:
        lora_fx.apply(graph_module, rules(dropout=0.1))
    assert {path for path, _ in caught.value.refusals} == {"tokens", "first", "second", "qkv", "kernel", "scaled"}
    assert graph_module.code == code
    tuned = lora_fx.apply(graph_module, rules(dropout=0.1), backend="modules")
    randomise_(tuned)
    assert not torch.equal(tuned.train()(IDS), tuned.eval()(IDS))


def test_dropout_of_layers_acts_in_training_only():
    chosen = {"rules": [{"match": {"name": ["conv", "words", "last"]}, "lora": {"r": 2, "dora": True, "dropout": 0.5}}]}
    tuned = lora_fx.apply(traced(), chosen)
    randomise_(tuned)
    assert torch.equal(tuned.eval()(IDS), tuned(IDS))
    assert not torch.equal(tuned.train()(IDS), tuned(IDS))
    assert torch.equal(lora_fx.remove(tuned)(IDS), traced()(IDS))
