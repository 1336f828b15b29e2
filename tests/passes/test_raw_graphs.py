"""Raw parameters in a user's own GraphModule: found through views, adapted node by node, taken out again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.adapters.attach import all_attached, owner_path
from lora_fx.passes.merge import Merge
from lora_fx.passes.verify import verify
from tests.support.zoo import randomise_

QKV_ON_Q = {
    "version": 1,
    "rules": [
        {"match": {"name": "qkv"}, "lora": {"r": 2}, "slices": {"of": ["q", "k", "v"], "adapt": ["q"]}},
        {"match": {"name": "**"}, "lora": {"r": 2}},
    ],
}


class Everything(nn.Module):
    """Raw parameters in every position, beside layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.5, requires_grad=False)

        self.tokens, self.first, self.second = parameter(7, 4), parameter(6, 4), parameter(6, 5)
        self.bank, self.qkv, self.kernel = parameter(3, 5, 5), parameter(15, 5), parameter(5, 1, 3)
        self.heads, self.scaled = parameter(2, 5, 5), parameter(5, 5)
        self.conv, self.last = nn.Conv1d(5, 5, 3, padding=1, groups=5), nn.Linear(5, 5)
        self.requires_grad_(False)

    def forward(self, ids):  # torch.fx cannot pickle graphs of functions with annotations that are strings
        x = F.linear(F.embedding(ids, self.tokens), self.first) @ self.second
        x = torch.einsum("bsd,dk->bsk", x, self.bank[1]) + x @ self.bank[2].T
        x = F.conv1d(self.conv(x.transpose(1, 2)), self.kernel, padding=1, groups=5).transpose(1, 2)
        q, _, v = self.qkv.chunk(3)
        x = F.linear(x, q) * F.linear(x, v)
        x = torch.einsum("bsd,hdk->bshk", x, self.heads).sum(2)
        return self.last(torch.tanh(F.linear(x, self.scaled * 2) + torch.matmul(x, self.scaled)))


IDS = torch.arange(12).view(2, 6) % 7


def traced() -> fx.GraphModule:
    return fx.symbolic_trace(Everything())


def exported() -> nn.Module:
    return torch.export.export(Everything(), (IDS,)).module()


@pytest.fixture(params=[traced, exported], ids=["traced", "exported"])
def graph_module(request: pytest.FixtureRequest) -> fx.GraphModule:
    made = request.param()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def adapted(graph_module: fx.GraphModule, **lora: object) -> fx.GraphModule:
    rules = copy.deepcopy(QKV_ON_Q)
    for rule in rules["rules"]:
        rule["lora"].update(lora)
    tuned = lora_fx.apply(graph_module, rules)
    assert isinstance(tuned, fx.GraphModule)
    return tuned


def with_dense_deltas(graph_module: fx.GraphModule, tuned: fx.GraphModule) -> fx.GraphModule:
    """Return the graph module with W + ΔW in the place of every adapted weight."""
    dense = copy.deepcopy(graph_module)
    for path, adapter in all_attached(tuned):
        owner = dense.get_submodule(owner_path(path, adapter))
        weight = owner._parameters[adapter.spec.parameter]
        owner._parameters[adapter.spec.parameter] = nn.Parameter(weight + adapter.delta(), requires_grad=False)
    return dense


def test_plan_names_every_raw_parameter_of_the_graph_with_what_is_done_to_it():
    plan = lora_fx.plan(traced(), QKV_ON_Q)
    assert {site.path: (site.op, site.shape, site.calls) for site in plan.sites} == {
        "tokens": ("embedding", (4, 7), 1),
        "first": ("linear", (6, 4), 1),
        "second": ("matmul", (5, 6), 1),
        "bank": ("experts", (3, 5, 5), 2),
        "qkv": ("linear", (15, 5), 2),
        "kernel": ("conv1d", (5, 1, 3), 1),
        "heads": ("matmul", (2, 5, 5), 1),
        "scaled": ("matmul", (5, 5), 2),
        "conv": ("conv1d", (5, 1, 3), 1),
        "last": ("linear", (5, 5), 1),
    }
    assert {site.backend for site in plan.adapted} == {"graph"}


def test_adapted_graph_starts_bit_equal_to_its_base_and_verifies(graph_module):
    tuned = adapted(graph_module)
    assert torch.equal(tuned(IDS), graph_module(IDS))
    verify(tuned)


def test_adapted_graph_computes_what_dense_weights_compute(graph_module):
    tuned = adapted(graph_module)
    randomise_(tuned)
    torch.testing.assert_close(tuned(IDS), with_dense_deltas(graph_module, tuned)(IDS), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tuned(IDS), graph_module(IDS), atol=1e-3)


def test_gradients_reach_both_factors_of_every_site(graph_module):
    tuned = adapted(graph_module)
    randomise_(tuned)
    tuned(IDS).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in lora_fx.parameters(tuned))


def test_merging_and_removing_leave_the_graph_as_it_was(graph_module):
    tuned = adapted(graph_module)
    randomise_(tuned)
    merged, removed = lora_fx.merge(tuned), lora_fx.remove(tuned)
    torch.testing.assert_close(merged(IDS), tuned(IDS), rtol=1e-5, atol=1e-6)
    assert torch.equal(removed(IDS), graph_module(IDS))
    for plain in (merged, removed):
        assert not lora_fx.diff(plain, graph_module)
        assert list(plain.state_dict()) == list(graph_module.state_dict())


def test_disabled_graph_computes_what_its_base_computes(graph_module):
    tuned = adapted(graph_module)
    randomise_(tuned)
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(IDS), graph_module(IDS))


def test_pickled_graph_can_still_be_merged_and_removed():
    tuned = adapted(traced())
    randomise_(tuned)
    again = pickle.loads(pickle.dumps(tuned))
    assert torch.equal(again(IDS), tuned(IDS))
    assert torch.equal(lora_fx.remove(again)(IDS), traced()(IDS))


def test_dropout_acts_in_training_only():
    tuned = adapted(traced(), dropout=0.5)
    randomise_(tuned)
    assert torch.equal(tuned.eval()(IDS), tuned(IDS))
    assert not torch.equal(tuned.train()(IDS), tuned(IDS))
    assert torch.equal(lora_fx.remove(tuned)(IDS), traced()(IDS))


class NamedWeight(nn.Module):
    """A raw parameter whose adapter stands beside it, not in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4), requires_grad=False)

    def forward(self, x):
        return torch.tanh(x @ self.weight)


def test_parameter_called_weight_loses_its_adapter_with_its_dropout():
    base, x = fx.symbolic_trace(NamedWeight()), torch.ones(3, 4)
    tuned = lora_fx.apply(
        base, {"version": 1, "rules": [{"match": {"name": "weight"}, "lora": {"r": 2, "dropout": 0.5}}]}
    )
    randomise_(tuned)
    for plain in (lora_fx.remove(tuned), lora_fx.merge(tuned)):
        assert not lora_fx.diff(plain, base)
    assert torch.equal(lora_fx.remove(tuned)(x), base(x))


def test_half_precision_graph_gets_float32_factors():
    half = fx.symbolic_trace(Everything().bfloat16())
    tuned = adapted(half, dropout=0.1)
    assert torch.equal(tuned.eval()(IDS), half(IDS))
    assert {parameter.dtype for parameter in lora_fx.parameters(tuned)} == {torch.float32}
    assert torch.equal(lora_fx.remove(tuned)(IDS), half(IDS))


def test_adapter_of_a_graph_is_saved_and_loaded_bit_by_bit(tmp_path):
    tuned = adapted(traced())
    randomise_(tuned)
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(lora_fx.load(traced(), tmp_path)(IDS), tuned(IDS))


def test_diff_shows_the_adapter_at_each_product_with_a_raw_parameter():
    base = traced()
    text = str(lora_fx.diff(base, adapted(base)))
    assert "@@ second · rule 2 · r=2 scaling=8 ·" in text
    assert text.count("+ self.bank_lora(..) * 8.0") == 2


class Root(nn.Module):
    """A raw parameter of the root, and one of a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.w)


def test_journal_of_a_merge_names_each_weight_and_its_site():
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(fx.symbolic_trace(Root()), rules)
    edits = passes.run(tuned, [Merge()]).journal.edits
    assert [(edit.what, edit.site) for edit in edits if edit.kind == "set weight"] == [
        ("w", "w"),
        ("inner.weight", "inner"),
    ]


# -- without inputs


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_in, self.offset = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in) + self.offset


def test_straight_line_forward_shows_its_raw_parameters_without_inputs():
    plan = lora_fx.plan(Straight(), {"version": 1, "rules": [{"match": {"name": "**"}}]})
    assert [(site.path, site.op, site.shape, site.decision) for site in plan.sites] == [
        ("weight_in", "linear", (8, 4), "adapt")
    ]


class Branches(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_raw_parameter_of_which_nothing_is_known_is_refused_and_inputs_show_it():
    rules = {"version": 1, "rules": [{"match": {"name": "weight_in"}}]}
    (first, _) = lora_fx.plan(Branches(), rules).sites
    assert (first.decision, first.reason) == (
        "refuse",
        "a raw parameter: how it is used shows only with example_inputs",
    )
    (only,) = lora_fx.plan(Branches(), rules, (torch.ones(3, 4),)).sites
    assert only.decision == "adapt"


class Made(nn.Module):
    """Multiplies by what is made from its parameters."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
        self.length, self.table = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(2, 8))
        self.register_buffer("mask", torch.ones(4, 8).tril())
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + self.table * self.length, self.make(self.a, self.b, self.length, self.mask))


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (lambda a, b, length, mask: torch.cat([a, b]), ["a", "b"]),
        (lambda a, b, length, mask: torch.stack([a, b]).flatten(0, 1), ["a", "b"]),
        (lambda a, b, length, mask: a * length, ["a"]),
        (lambda a, b, length, mask: (a * mask).view(4, 8), ["a"]),
        (lambda a, b, length, mask: torch.tril(a), ["a"]),
        (lambda a, b, length, mask: torch.where(mask > 0, a, b), ["a", "b"]),
        (lambda a, b, length, mask: (a - a.mean(1, keepdim=True)) / a.std(1, keepdim=True), ["a"]),
    ],
    ids=["joined", "stacked", "scaled", "masked", "a triangle", "of two", "standardised"],
)
def test_weights_that_are_changed_before_they_multiply_are_adapted_in_a_graph_as_in_a_module(make, sites):
    model, x = Made(make), torch.randn(2, 8)
    graph = fx.symbolic_trace(model)
    rules = {"version": 1, "rules": [{"match": {"name": ["a", "b", "table"]}, "lora": {"r": 2}}]}
    planned = [[(s.path, s.site.layout) for s in lora_fx.plan(m, rules, (x,)).adapted] for m in (model, graph)]
    assert planned == [[(site, "out_in") for site in sites]] * 2
    tuned, other = lora_fx.apply(graph, rules, (x,)), lora_fx.apply(model, rules, (x,))
    assert torch.equal(tuned(x), graph(x))
    for parameter, twin in zip(lora_fx.parameters(tuned), lora_fx.parameters(other), strict=True):
        with torch.no_grad():
            twin.copy_(parameter.normal_())
    assert not torch.allclose(tuned(x), graph(x), atol=1e-2)
    torch.testing.assert_close(tuned(x), other(x))
    torch.testing.assert_close(lora_fx.merge(tuned)(x), tuned(x), rtol=1e-4, atol=1e-4)
    for gradients, wanted in zip(
        *(torch.autograd.grad(m(x).cos().sum(), [*lora_fx.parameters(m)]) for m in (tuned, other))
    ):
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(lora_fx.remove(tuned)(x), graph(x))
