"""allocate: ranks under a budget, by spectrum or gradient, as rules that do it and a table that says why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.adapters.factors import decompositions
from lora_fx.adapters.factors.decompositions import leading_values
from lora_fx.discovery import gradients
from lora_fx.errors import CaptureError, InvariantError, NoMatchError, RefusedError, RuleError
from lora_fx.planning.ranks import Gains, spread
from tests.support.compoundkinds import EXPERTS
from tests.support.zoo import ZOO, Gpt, tokens

DATA = [(torch.randn(40, 12, generator=torch.Generator().manual_seed(n)),) for n in range(3)]


class Three(nn.Module):
    """`peaked` has nearly all of its weight in two directions, `flat` in all alike; only `used` moves the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.peaked, self.flat, self.used = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)
        left, _, right = torch.linalg.svd(torch.randn(16, 12), full_matrices=False)
        with torch.no_grad():
            self.peaked.weight.copy_(left @ torch.diag(torch.tensor([4.0, 3.0] + [0.01] * 10)) @ right)
            self.flat.weight.copy_(left @ right)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.used(x) + 1e-3 * (self.peaked(x) + self.flat(x))


def rules(name: str = "*", r: int = 4, **lora: Any) -> dict[str, Any]:
    return {"rules": [{"name": "all", "match": {"name": name}, "lora": {"r": r, "alpha": 2 * r, **lora}}]}


def squared(output: Tensor, _batch: Any) -> Tensor:
    return output.square().mean()


def ranks_of(allocation: lora_fx.Allocation) -> dict[str, int]:
    return {site.path: site.r for site in allocation.sites}


# -- what comes out


def test_by_spectrum_the_ranks_go_where_few_directions_have_most_of_the_weight():
    found = lora_fx.allocate(Three(), rules("{peaked,flat}", r=4), mean_r=4)
    assert ranks_of(found) == {"peaked": 2, "flat": 6}  # two directions have all of it; then any of the flat ones
    alike = lora_fx.allocate(Three(), rules("{peaked,flat}", r=2), mean_r=2)
    assert ranks_of(alike) == {"peaked": 2, "flat": 2}
    assert found.by == "spectrum"
    assert found.sites[0].held == pytest.approx(1.0, abs=1e-3)
    assert found.sites[1].held == pytest.approx(6 / 12, abs=1e-4)


def test_by_gradient_they_go_where_a_step_lowers_the_loss_most():
    found = lora_fx.allocate(Three(), rules(r=4), data=DATA, loss=squared)
    assert found.by == "gradient"
    assert ranks_of(found) == {"peaked": 2, "flat": 2, "used": 8}  # what is left when `used` has twice the even share
    assert found.sites[2].limit == "at most 8"
    sizes = [site.size for site in found.sites]
    assert sizes[2] > 1e4 * max(sizes[:2])


def test_gains_are_those_of_an_exact_decomposition_of_weight_and_mean_gradient():
    model = Three()
    found = lora_fx.allocate(model, rules(r=4), data=DATA, loss=squared)
    twin = copy.deepcopy(model)
    for batch in DATA:
        squared(twin(*batch), None).backward()
    for site in found.sites:
        slope = twin.get_submodule(site.path).weight.grad.double() / len(DATA)
        values = torch.linalg.svdvals(slope).square()
        assert site.size == pytest.approx(float(values.sum()), rel=1e-5)
        torch.testing.assert_close(
            torch.tensor(site.gains), (values / values.sum())[: len(site.gains)].float(), rtol=1e-4, atol=1e-6
        )
    by_weight = lora_fx.allocate(model, rules(r=4))
    for site in by_weight.sites:
        values = torch.linalg.svdvals(model.get_submodule(site.path).weight.double()).square()
        torch.testing.assert_close(
            torch.tensor(site.gains), (values / values.sum())[: len(site.gains)].float(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("budget", [None, 140, 500, 700, 10_000])
def test_the_budget_is_kept_and_the_plan_says_the_same(budget):
    model = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 6), nn.Linear(6, 30))
    found = lora_fx.allocate(model, rules(r=3), budget=budget)
    plan = lora_fx.plan(model, found)
    assert {site.path: site.lora.r for site in plan.adapted} == ranks_of(found)
    assert plan.trainable == found.parameters <= found.budget
    assert found.budget == (budget or lora_fx.plan(model, rules(r=3)).trainable)
    assert {site.lora.scaling for site in plan.adapted} == {2.0}
    is_full = all(site.limit.startswith(("at most", "its weight")) for site in found.sites)
    assert is_full or found.budget - found.parameters < 52


def test_the_mean_rank_is_kept_and_no_side_of_a_weight_is_exceeded():
    model = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 2), nn.Linear(2, 30))
    found = lora_fx.allocate(model, rules(r=2), mean_r=5.5, most=12)
    ranks = ranks_of(found)
    assert ranks == {"0": 12, "1": 2, "2": 2}
    assert [site.limit for site in found.sites] == [
        "at most 12",
        "its weight has no more than 2",
        "its weight has no more than 2",
    ]


def test_without_a_least_rank_what_gains_nothing_is_skipped_with_a_reason():
    found = lora_fx.allocate(Three(), rules(r=2), data=DATA, loss=squared, budget=2 * 28, least=0)
    assert ranks_of(found) == {"peaked": 0, "flat": 0, "used": 2}
    plan = lora_fx.plan(Three(), found)
    assert {site.path: (site.decision, site.reason) for site in plan.sites if site.decision == "skip"} == {
        "peaked": ("skip", "others gain more by a rank"),
        "flat": ("skip", "others gain more by a rank"),
    }


def test_the_result_is_written_as_yaml_with_its_table_and_read_as_the_same(tmp_path):
    model = Three()
    found = lora_fx.allocate(model, rules(r=4), data=DATA, loss=squared, budget=331)
    path = tmp_path / "rules.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    assert lora_fx.plan(model, path).rules == lora_fx.plan(model, found).rules
    assert yaml.safe_load(found.to_yaml()) == found.short_dict()
    for line in str(found).splitlines():
        assert f"## {line}".rstrip() in found.to_yaml()
    assert "used" in str(found)
    assert "of all ‖G‖²" in str(found)
    tuned = lora_fx.apply(model, path)
    lora_fx.save(tuned, tmp_path / "adapter")
    again = lora_fx.load(model, tmp_path / "adapter")
    assert {site.path: site.r for site in lora_fx.deltas(again).sites} == ranks_of(found)


def test_the_same_call_gives_the_same_and_leaves_the_model_and_random_numbers_alone():
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 9)).train()
    model[0].weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first, second = (lora_fx.allocate(model, rules(r=2), data=DATA, loss=squared) for _ in range(2))
    assert first == second
    assert lora_fx.allocate(model, rules(r=2)) == lora_fx.allocate(model, rules(r=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_gradients_of_a_few_weights_at_a_time_are_the_same(monkeypatch):
    model = Three()
    whole = lora_fx.allocate(model, rules(), data=DATA, loss=squared)
    held: list[int] = []
    taken = gradients._taken

    def noting(group, weights, batches, made):
        held.append(sum(weight.grad.numel() for weight in weights.values()))
        return taken(group, weights, batches, made)

    monkeypatch.setattr(gradients, "TOGETHER", 200)
    monkeypatch.setattr(gradients, "_taken", noting)
    assert lora_fx.allocate(model, rules(), data=DATA, loss=squared) == whole
    assert held == [192, 192, 192]


# -- kinds of sites and rules


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
def test_every_kind_of_small_model_gets_ranks_that_its_plan_has(specimen):
    model, inputs = specimen.build(), specimen.sample()
    wanted = {"rules": [{"match": {"name": specimen.rule}, "lora": {"r": 3, "alpha": 6}}]}
    found = lora_fx.allocate(model, wanted, inputs)
    plan = lora_fx.plan(model, found, inputs)
    assert {site.path: site.lora.r for site in plan.adapted} == ranks_of(found)
    assert plan.trainable == found.parameters <= lora_fx.plan(model, wanted, inputs).trainable


@pytest.mark.parametrize("kind", EXPERTS[:2], ids=lambda kind: kind.name)
def test_each_expert_of_a_bank_counts_as_a_matrix_of_its_own(kind):
    model, inputs = kind.build(), kind.sample()
    wanted = {"rules": [{"match": {"op": "experts"}, "lora": {"r": 2}}]}
    by_weight = lora_fx.allocate(model, wanted, inputs)
    by_slope = lora_fx.allocate(
        model, wanted, data=[inputs], loss=lambda output, _: first_tensor(output).square().mean()
    )
    bank = lora_fx.plan(model, wanted, inputs).adapted[0].site.bank
    for found in (by_weight, by_slope):
        plan = lora_fx.plan(model, found, inputs)
        assert {site.path: site.lora.r for site in plan.adapted} == ranks_of(found)
        assert plan.trainable == found.parameters <= lora_fx.plan(model, wanted, inputs).trainable
    assert by_weight.sites[0].size == bank > 1


def test_ranks_that_are_divided_among_experts_are_spread_as_they_are_planned():
    kind = EXPERTS[0]
    model, inputs = kind.build(), kind.sample()
    bank = lora_fx.plan(model, {"rules": [{"match": {"op": "experts"}}]}, inputs).adapted[0].site.bank
    lora = {"r": 2 * bank, "alpha": 8, "divide_r": "experts", "share": "A"}
    wanted = {"rules": [{"match": {"name": "**", "op": ["experts", "linear"]}, "lora": lora}]}
    before = lora_fx.plan(model, wanted, inputs)
    found = lora_fx.allocate(model, wanted, inputs, budget=before.trainable // 2)
    after = lora_fx.plan(model, found, inputs)
    assert {site.path: site.lora.r for site in after.adapted} == ranks_of(found)
    assert after.trainable == found.parameters <= before.trainable // 2
    for old, new in zip(before.adapted, after.adapted, strict=True):
        assert (new.lora.share, new.lora.scaling) == (old.lora.share, pytest.approx(old.lora.scaling))
    assert lora_fx.plan(model, yaml.safe_load(found.to_yaml()), inputs).trainable == after.trainable


def first_tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else next(value for value in output if isinstance(value, Tensor))


def test_convolutions_embeddings_slices_and_several_rules_keep_all_but_their_ranks():
    torch.manual_seed(0)
    model = Gpt()
    wanted = {
        "rules": [
            {"match": {"name": "**.c_attn"}, "lora": {"r": 2, "dora": False, "dropout": 0.1}, "slices": {"of": ["q", "k", "v"], "adapt": ["q", "v"]}},
            {"name": "mlp", "match": {"name": "**.{c_fc,c_out}"}, "lora": {"r": 4, "rslora": True, "adapter": "other"}, "expect": 6},
            {"name": "positions", "match": {"name": "wpe"}, "lora": {"r": 4}},
        ],
        "train": ["ln_f"],
    }  # fmt: skip
    ids = tokens(2, 6)
    for data in (None, [(ids,)]):
        given = {} if data is None else {"data": data, "loss": squared}
        found = lora_fx.allocate(model, wanted, (ids,), **given)
        before, after = (lora_fx.plan(model, which, (ids,)) for which in (wanted, found))
        assert after.train == before.train
        assert {site.path: site.lora.r for site in after.adapted} == ranks_of(found)
        for old, new in zip(before.adapted, after.adapted, strict=True):
            assert (new.path, new.slices, new.per_call) == (old.path, old.slices, old.per_call)
            assert (new.lora.dropout, new.lora.rslora, new.lora.adapter) == (
                old.lora.dropout,
                old.lora.rslora,
                old.lora.adapter,
            )
            assert new.lora.alpha / new.lora.r == pytest.approx(old.lora.alpha / old.lora.r)
        assert found.parameters <= found.budget == before.trainable - before.train[0].parameters
    convolutional = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 3))
    found = lora_fx.allocate(convolutional, rules(r=2), data=[(torch.randn(2, 4, 9, 9),)], loss=squared)
    assert lora_fx.plan(convolutional, found).trainable == found.parameters


def test_a_graph_module_and_quantised_weights_have_spectra_too():
    traced = fx.symbolic_trace(Three())
    assert ranks_of(lora_fx.allocate(traced, rules())) == ranks_of(lora_fx.allocate(Three(), rules()))
    by_slope = lora_fx.allocate(traced, rules(), data=DATA, loss=squared)
    assert ranks_of(by_slope) == ranks_of(lora_fx.allocate(Three(), rules(), data=DATA, loss=squared))
    torchao = pytest.importorskip("torchao.quantization")
    coarse = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    torchao.quantize_(coarse, torchao.Int8WeightOnlyConfig())
    assert sum(ranks_of(lora_fx.allocate(coarse, rules(r=8))).values()) == 16
    with pytest.raises(RefusedError, match=r"allocate needs gradients of the weights[\s\S]*quantised"):
        lora_fx.allocate(coarse, rules(r=8), data=[(torch.randn(3, 64),)], loss=squared)


def test_an_initialisation_that_needs_more_values_than_the_rank_caps_it():
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 12))
    found = lora_fx.allocate(model, rules(r=5, init="lora_ga"), mean_r=8, most=16)
    assert ranks_of(found) == {"0": 6, "1": 6}
    plan = lora_fx.plan_from_data(model, found, DATA, loss=squared)
    assert [site.lora.r for site in plan.adapted] == [6, 6]
    assert lora_fx.allocate(model, rules(r=5, init="pissa"), mean_r=12, most=16).sites[0].r == 12


# -- the parts


def test_spread_takes_what_a_search_through_all_would_take():
    generator = torch.Generator().manual_seed(0)
    sites = [Gains(str(n), tuple(sorted(torch.rand(4, generator=generator).tolist(), reverse=True))) for n in range(3)]
    choices = [(a, b, c) for a in range(5) for b in range(5) for c in range(5) if a + b + c == 6]
    best = max(choices, key=lambda ranks: sum(sum(site.values[:r]) for site, r in zip(sites, ranks, strict=True)))
    assert tuple(spread(sites, 6).values()) == best
    assert tuple(spread(sites, 100).values()) == (4, 4, 4)
    assert spread([Gains("a", (0.0, 0.0)), Gains("b", ())], 1) == {"a": 1, "b": 0}
    assert spread([Gains("a", (9.0,), 5), Gains("b", (1.0,), 2)], 3) == {"a": 0, "b": 1}


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1000, 64)])
def test_leading_values_are_those_of_a_whole_decomposition(shape, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(1, 0.01, shape[1]) ** 2
    matrix = torch.randn(shape, generator=generator) * scales
    state = torch.get_rng_state()
    assert torch.equal(leading_values(matrix, 6), torch.linalg.svdvals(matrix)[:6])
    monkeypatch.setattr(decompositions, "WHOLE", 10)
    few = leading_values(matrix, 6)
    torch.testing.assert_close(few, torch.linalg.svdvals(matrix)[:6], rtol=1e-2, atol=0)
    assert not torch.equal(few, torch.linalg.svdvals(matrix)[:6])
    assert torch.equal(few, leading_values(matrix, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert leading_values(matrix.double()[:8, :8], 20).shape == (8,)


# -- what is refused


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"budget": 0}, ValueError, "budget is 0; it must be a number of parameters"),
        ({"budget": 3.5}, ValueError, "budget is 3.5"),
        ({"budget": True}, ValueError, "budget is True"),
        ({"mean_r": float("nan")}, ValueError, "mean_r is nan"),
        ({"mean_r": -1}, ValueError, "mean_r is -1"),
        ({"budget": 10, "mean_r": 2}, ValueError, "two ways to say one thing"),
        ({"least": -1, "most": 0}, ValueError, "least is -1; .*most is 0"),
        ({"least": 4, "most": 3}, ValueError, "least is 4, above most, 3"),
        ({"loss": squared}, ValueError, "loss is for data"),
        ({"data": []}, RefusedError, "data has no batches"),
        ({"data": [torch.zeros(2, 12)]}, CaptureError, "bare tensor"),
        ({"data": DATA}, RefusedError, "allocate needs a loss that is a scalar"),
        ({"data": [(DATA[0][0] * float("nan"),)], "loss": squared}, RefusedError, "these gradients are not finite"),
        ({"budget": 3 * 28 - 1}, RefusedError, r"below rank 1 at each of 3 sites[\s\S]*needed  84 parameters"),
        ({"mean_r": 0.9}, RefusedError, "below rank 1 at each of 3 sites"),
        ({"rules": rules(init="eva")}, RefusedError, "init eva chooses ranks itself"),
        ({"rules": rules("nothing")}, NoMatchError, "matched none"),
        ({"rules": rules(rank=3)}, RuleError, "unknown key"),
        ({"rules": {"rules": [{"match": {"name": "*"}, "skip": "all"}]}}, RefusedError, "adapt no site"),
    ],
)
def test_what_cannot_be_is_refused_by_name(given, kind, message):
    given = {"rules": rules(), **given}
    with pytest.raises(kind, match=message):
        lora_fx.allocate(Three(), **given)


def test_bad_numbers_are_refused_before_the_model_is_touched():
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("ran")

    for given in ({"budget": -1}, {"data": []}, {"least": 2, "most": 1}):
        with pytest.raises((ValueError, RefusedError)):
            lora_fx.allocate(Untouchable(), rules(), DATA[0], **given)


def test_what_has_no_numbers_and_what_no_gradient_reaches_is_named():
    with torch.device("meta"):
        empty = Three()
    with pytest.raises(RefusedError, match=r"needs the numbers of the weights[\s\S]*has no values \(meta device\)"):
        lora_fx.allocate(empty, rules())

    class Idle(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.flat(x).detach()

    with pytest.raises(RefusedError, match=r"does not show enough[\s\S]*flat  "):
        lora_fx.allocate(Idle(), rules("{flat,used}"), data=DATA, loss=squared)
    broken = Three()
    with torch.no_grad():
        broken.flat.weight[0, 0] = float("inf")
    with pytest.raises(RefusedError, match=r"these weights are not finite[\s\S]*flat"):
        lora_fx.allocate(broken, rules())
    with pytest.raises(RefusedError, match="adapted"):
        lora_fx.allocate(lora_fx.apply(Three(), rules()), rules())


def test_an_adapter_for_each_call_has_a_spectrum_and_no_gradient_of_its_own():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    wanted = rules(r=2)
    wanted["rules"][0]["per_call"] = True
    found = lora_fx.allocate(Twice(), wanted, DATA[0])
    assert found.parameters == lora_fx.plan(Twice(), found, DATA[0]).trainable == 2 * 2 * 24
    with pytest.raises(RefusedError, match=r"all calls together[\s\S]*layer"):
        lora_fx.allocate(Twice(), wanted, data=DATA, loss=squared)


def test_rules_that_would_decide_otherwise_are_found(monkeypatch):
    from lora_fx.discovery import allocating

    real = allocating.with_ranks
    monkeypatch.setattr(
        allocating, "with_ranks", lambda rules, sites, ranks, *rest: real(rules, sites, {**ranks, "flat": 1}, *rest)
    )
    with pytest.raises(InvariantError, match="flat"):
        lora_fx.allocate(Three(), rules())
