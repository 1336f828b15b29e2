"""First values from data: EVA, CorDA, LoRA-GA and LoftQ, each equal to PEFT's; nothing happens to the caller's model."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.factors.fromdata import Covariance, Directions
from lora_fx.errors import CaptureError, RefusedError
from tests.adapters.test_moved import Pair, rules, trained

MIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(2))
BATCHES = [torch.randn(60, 12, generator=torch.Generator().manual_seed(3 + n)) @ MIX for n in range(3)]
DATA = [(x,) for x in BATCHES]


def square(output: Tensor, _batch: Any) -> Tensor:
    return output.square().mean()


def theirs(base: nn.Module, init: str, prepare: Any, **settings: Any) -> dict[str, Tensor]:
    """Return PEFT's A and B after its preparation has run on a copy of the base."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(base)
    config = peft.LoraConfig(lora_alpha=8, target_modules=["a", "b"], init_lora_weights=init, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's hooks warn of their own use
        prepare(model, config)
        model = peft.get_peft_model(model, config)
    return {name: p.detach() for name, p in model.base_model.model.named_parameters() if p.requires_grad}


def starts_at_its_base(tuned: nn.Module, base: nn.Module) -> bool:
    return torch.equal(tuned(BATCHES[0]), base(BATCHES[0]))


@pytest.mark.parametrize(("init", "method"), [("corda", "ipm"), ("corda_kpm", "kpm")])
def test_corda_is_that_of_peft_and_starts_at_the_base(init, method):
    peft = pytest.importorskip("peft.tuners.lora.corda")
    from peft.tuners.lora.config import CordaConfig

    base = Pair()

    def prepare(model: nn.Module, config: Any) -> None:
        peft.preprocess_corda(model, config, run_model=lambda: [model(x) for x in BATCHES])

    other = theirs(base, "corda", prepare, r=4, corda_config=CordaConfig(corda_method=method))
    tuned = lora_fx.apply(base, lora_fx.plan_from_data(base, rules(init), DATA))
    own = dict(tuned.named_parameters())
    for name, value in other.items():
        torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-5)
    assert starts_at_its_base(tuned, base)


def test_lora_ga_is_that_of_peft_and_starts_at_the_base():
    peft = pytest.importorskip("peft.tuners.lora.loraga")
    from peft.tuners.lora.config import LoraGAConfig

    base = Pair()

    def prepare(model: nn.Module, config: Any) -> None:
        peft.preprocess_loraga(model, config, lambda: [square(model(x), None).backward() for x in BATCHES])

    other = theirs(base, "lora_ga", prepare, r=2, lora_ga_config=LoraGAConfig())
    plan = lora_fx.plan_from_data(base, rules("lora_ga", r=2), DATA, loss=square)
    tuned = lora_fx.apply(base, plan)
    own = dict(tuned.named_parameters())
    for name, value in other.items():  # singular vectors have no sign
        torch.testing.assert_close(own[name].abs(), value.abs(), rtol=1e-4, atol=1e-5)
    assert starts_at_its_base(tuned, base)
    assert all(parameter.grad is None for parameter in base.parameters())
    before = square(base(BATCHES[0]), None)
    assert square(trained(tuned, BATCHES[0])(BATCHES[0]), None) < before


def test_eva_finds_the_directions_of_the_inputs_in_whatever_batches():
    rows = torch.cat(BATCHES)
    centred = rows - rows.mean(0)
    _, values, right = torch.linalg.svd(centred, full_matrices=False)
    whole = Directions(12)
    for batch in BATCHES:
        whole.add(batch)
    torch.testing.assert_close(whole.values, values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((whole.components @ right.t()).abs(), torch.eye(12), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(float(whole.shares().sum()), 1.0, rtol=1e-4, atol=0)
    base = Pair()
    tuned = lora_fx.apply(base, lora_fx.plan_from_data(base, rules("eva"), DATA))
    adapter = next(all_attached(tuned))[1]
    assert (adapter.lora_A.weight @ right[:4].t()).abs().diagonal().min() > 0.9
    assert not adapter.lora_B.weight.any()
    assert starts_at_its_base(tuned, base)


def test_eva_is_that_of_peft():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    base, data = Pair(), [BATCHES[0]]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["a", "b"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
    )
    whole = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        initialize_lora_eva_weights(model, [{"x": x} for x in data], **whole)
    plan = lora_fx.plan_from_data(base, rules("eva"), [(x,) for x in data])
    own = dict(lora_fx.apply(base, plan).named_parameters())
    for name, value in model.base_model.model.named_parameters():
        if "lora_A" in name:
            assert own[name].shape == value.shape
            assert (own[name] @ value.t()).abs().diagonal().min() > 0.95  # PEFT's directions are an estimate


class Unequal(nn.Module):
    """Inputs of one direction for `a`, of all for `b`; `c` is given the least."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x[:, :1].expand(-1, 12) + 0.01 * x) + self.b(x) + self.c(x)


def test_ranks_go_where_they_explain_most_and_the_plan_and_its_rules_say_so(tmp_path):
    base, data = Unequal(), [(torch.randn(200, 12),)]
    plan = lora_fx.plan_from_data(base, rules("eva", name="{a,b}"), data)
    ranks = {site.path: site.lora.r for site in plan.adapted}
    assert sum(ranks.values()) == 8
    assert ranks["a"] < ranks["b"] <= 8
    assert [site.lora.scaling for site in plan.adapted] == [2.0, 2.0]
    assert "eva r=" in str(plan)
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(plan.rules))
    assert {s.path: s.lora.r for s in lora_fx.plan(base, path, data).adapted} == ranks
    tuned = lora_fx.apply(base, plan)
    assert torch.equal(tuned(data[0][0]), base(data[0][0]))
    lora_fx.save(tuned, tmp_path / "adapter")
    assert torch.equal(lora_fx.load(base, tmp_path / "adapter", data)(data[0][0]), tuned(data[0][0]))


def test_what_explains_nothing_is_skipped():
    class Constant(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(torch.ones(len(x), 16)).sum()

    plan = lora_fx.plan_from_data(Constant(), rules("eva"), DATA)
    assert {site.path: site.decision for site in plan.sites} == {"a": "adapt", "b": "skip"}
    assert next(site for site in plan.adapted).lora.r == 8


def test_padding_and_ignored_rows_do_not_count():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(12, 16)

        def forward(self, x: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            return self.up(x).sum(-1) * attention_mask + labels

    torch.manual_seed(0)
    base, x = Tokens(), torch.randn(2, 30, 12)
    mask, labels = torch.ones(2, 30, dtype=torch.long), torch.zeros(2, 30, dtype=torch.long)
    mask[1, 20:], labels[0, :5] = 0, -100
    spoiled = x.clone()
    spoiled[1, 20:], spoiled[0, :5] = 1e3, -1e3
    values = [
        lora_fx.plan_from_data(base, rules(init), [{"x": given, "attention_mask": mask, "labels": labels}])
        for init in ("eva", "corda")
        for given in (x, spoiled)
    ]
    for clean, dirty in (values[:2], values[2:]):
        assert all(torch.equal(a, b) for a, b in zip(clean.first_values["up"], dirty.first_values["up"], strict=True))


def test_loftq_makes_up_for_what_quantising_has_lost(tmp_path):
    base = Pair()
    coarse = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (coarse.a, coarse.b):
            layer.weight.copy_((layer.weight * 8).round() / 8)
    x = BATCHES[0]
    tuned = lora_fx.apply(coarse, lora_fx.plan_from_data(coarse, rules("loftq"), original=base, example_inputs=(x,)))
    lost = base.a.weight - coarse.a.weight
    left, values, right = torch.linalg.svd(lost)
    adapter = next(all_attached(tuned))[1]
    torch.testing.assert_close(adapter.delta(), left[:, :4] @ torch.diag(values[:4]) @ right[:4])
    assert (tuned(x) - base(x)).norm() < 0.7 * (coarse(x) - base(x)).norm()
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(lora_fx.load(coarse, tmp_path, (x,))(x), tuned(x))


def test_loftq_on_weights_that_torchao_has_quantised():
    torchao = pytest.importorskip("torchao.quantization")
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    coarse = copy.deepcopy(base)
    torchao.quantize_(coarse, torchao.Int8WeightOnlyConfig())
    x = torch.randn(20, 64)
    plan = lora_fx.plan_from_data(coarse, rules("loftq", r=16), original=base, example_inputs=(x,))
    tuned = lora_fx.apply(coarse, plan)
    assert (tuned(x) - base(x)).norm() < (coarse(x) - base(x)).norm()


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_moved_adapters_from_data_come_back_bit_by_bit(init, tmp_path):
    base = Pair()
    plan = lora_fx.plan_from_data(base, rules(init, r=2), DATA, loss=square)
    tuned = trained(lora_fx.apply(base, plan), BATCHES[0])
    lora_fx.save(tuned, tmp_path)
    again = lora_fx.load(base, tmp_path, DATA)
    mine, read = tuned.state_dict(), again.state_dict()
    assert all(torch.equal(mine[name], read[name]) for name in mine)
    assert torch.equal(again(BATCHES[0]), tuned(BATCHES[0]))


def test_a_plan_without_its_values_is_refused_before_anything_runs():
    base = Pair()
    plan = lora_fx.plan_from_data(base, rules("eva"), DATA)
    for given in (rules("eva"), lora_fx.Plan.from_json(plan.to_json())):
        with pytest.raises(RefusedError, match=r"made from data, and were not[\s\S]*plan_from_data"):
            lora_fx.apply(base, given, DATA)
    assert lora_fx.apply(base, plan, DATA[1]) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": rules("pissa"), "data": DATA}, "no site that is adapted has first values from data"),
        ({"rules": rules("eva")}, r"init eva needs `data`"),
        ({"rules": rules("loftq"), "data": DATA}, "init loftq needs `original`"),
        ({"rules": rules("lora_ga", r=2), "data": DATA}, "needs a loss that is a scalar"),
        ({"rules": rules("lora_ga", r=2), "data": DATA, "loss": lambda y, _: y.sum().detach()}, "with a gradient"),
        ({"rules": rules("lora_ga", r=7), "data": DATA, "loss": square}, "needs 14 singular values for r=7"),
        ({"rules": rules("eva"), "data": [(BATCHES[0][:3],)]}, "called with 3 rows that count, fewer than r=4"),
        ({"rules": rules("eva"), "data": [(BATCHES[0] * float("nan"),)]}, "NaN or infinite"),
        ({"rules": rules("loftq"), "original": nn.Linear(3, 3)}, "`original` is another model"),
    ],
)
def test_what_is_missing_or_wrong_is_named(given, message):
    given = {"example_inputs": (BATCHES[0],), "data": (), **given}
    with pytest.raises(RefusedError, match=message):
        lora_fx.plan_from_data(Pair(), **given)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BATCHES[0], r"`data` is no iterable of batches\n +found +Tensor \[\d+, \d+\]\n.*\[batch\]"),
        ({"x": BATCHES[0]}, r"`data` is no iterable of batches\n +found +dict"),
        ((BATCHES[0],), r"`data` is no iterable of batches\n +found +tuple"),
        ([BATCHES[0]], r"a batch of `data` is a bare tensor[\s\S]*into a tuple: \(x,\)"),
        ([(BATCHES[0],), None], "a batch of `data` is of type NoneType"),
        ([[]], "a batch of `data` is an empty list"),
    ],
)
def test_batches_of_another_form_are_said_to_be_the_datas(data, message):
    with pytest.raises(CaptureError, match=message) as caught:
        lora_fx.plan_from_data(Pair(), rules("eva"), data)
    assert "example_inputs" not in str(caught.value).splitlines()[0]


def test_data_may_be_what_a_for_loop_takes():
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, number: int) -> tuple[Tensor]:
            return (BATCHES[number],)

    given = lora_fx.plan_from_data(Pair(), rules("eva"), Rows())
    assert str(given) == str(lora_fx.plan_from_data(Pair(), rules("eva"), [(batch,) for batch in BATCHES]))


def test_a_layer_that_the_data_does_not_reach_is_named():
    class Branch(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    base = Branch()
    for settings in ({"init": "eva"}, {"init": "lora_ga", "r": 2}):
        with pytest.raises(RefusedError, match=r"does not show enough[\s\S]*b  "):
            lora_fx.plan_from_data(base, rules(**settings), DATA, loss=square)


def test_nothing_happens_to_the_callers_model():
    base = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).train()
    before = copy.deepcopy(base.state_dict())
    for init in ("eva", "corda", "lora_ga"):
        lora_fx.plan_from_data(base, rules(init, name="0", r=2), DATA, loss=square)
    assert base.training
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in base.parameters())
    assert not base[0]._forward_pre_hooks


def test_a_singular_covariance_is_damped_until_it_can_be_inverted():
    statistic = Covariance()
    statistic.add(torch.ones(3, 5))
    raised, inverse = statistic.damped()
    torch.testing.assert_close(raised @ inverse, torch.eye(5), rtol=0, atol=1e-2)
    statistic.add(torch.zeros(2, 5))
    assert statistic.count == 2


def test_an_adapter_that_is_added_needs_its_values_too():
    base = Pair()
    tuned = lora_fx.apply(base, rules("pissa"), DATA)
    with pytest.raises(RefusedError, match="made from data, and were not"):
        lora_fx.add(tuned, rules("eva"), adapter="b")
    assert torch.equal(tuned(BATCHES[0]), base(BATCHES[0]))
