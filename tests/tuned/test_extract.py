"""extract: the best adapter of a rank between two checkpoints, and what it cannot have."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxWarning, NoMatchError, RefusedError
from lora_fx.tuned.extract import extracted
from tests.support import zoo
from tests.support.zoo import rules

X = zoo.features(2, 3)


def changed(base: nn.Module, rank: int, *paths: str, scale: float = 0.1) -> nn.Module:
    """Return a copy of the model with a difference of that rank at each path."""
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for path in paths:
            weight = tuned.get_submodule(path).weight
            weight += scale * torch.randn(weight.shape[0], rank) @ torch.randn(rank, weight.shape[1])
    return tuned


def test_difference_of_low_rank_is_found_whole():
    base = zoo.Mlp().eval()
    tuned = changed(base, 3, "fc1", "fc2")
    adapted, report = extracted(tuned, base, r=3)
    torch.testing.assert_close(adapted(X), tuned(X), rtol=1e-5, atol=1e-5)
    assert [(site.path, site.r) for site in report.sites] == [("fc1", 3), ("fc2", 3)]
    assert all(site.retained == pytest.approx(1.0) for site in report.sites)
    assert report.lost == ()
    assert report.retained == pytest.approx(1.0)


def test_truncation_is_the_best_of_its_rank_and_the_energy_is_what_is_kept():
    base = nn.Sequential(nn.Linear(4, 4, bias=False)).double()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    adapted, report = extracted(tuned, base, r=2)
    assert report.sites[0].retained == pytest.approx((16 + 4) / (16 + 4 + 1))
    assert report.sites[0].norm == pytest.approx(math.sqrt(21))
    delta = lora_fx.merge(adapted)[0].weight - base[0].weight
    torch.testing.assert_close(delta, torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0], dtype=torch.float64)))


def test_factors_share_the_singular_values_evenly():
    base = zoo.Mlp()
    adapted, _ = extracted(changed(base, 2, "fc1"), base, r=2)
    a, b = adapted.fc1.lora_A["default"].weight, adapted.fc1.lora_B["default"].weight
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_linears_that_do_not_differ_get_no_adapter():
    base = zoo.Mlp()
    adapted = lora_fx.extract(changed(base, 2, "fc2"), base)
    assert [site.path for site in lora_fx.inspect(adapted).sites] == ["fc2"]


def test_scaling_is_one():
    base = zoo.Mlp()
    adapted = lora_fx.extract(changed(base, 2, "fc1"), base, r=5)
    assert adapted.fc1.lora_A["default"].spec.scaling == 1.0


def test_rank_above_the_matrix_keeps_everything():
    base = zoo.Mlp()
    tuned = changed(base, 16, "fc1")
    with pytest.warns(LoraFxWarning, match=re.escape("min(in, out)")):
        adapted = lora_fx.extract(tuned, base, r=20)
    torch.testing.assert_close(adapted(X), tuned(X), rtol=1e-4, atol=1e-4)


def test_extracted_adapter_can_be_saved_loaded_and_merged(tmp_path):
    base = zoo.Mlp().eval()
    tuned = changed(base, 2, "fc1", "fc2")
    adapted = lora_fx.extract(tuned, base, r=2)
    lora_fx.save(adapted, tmp_path)
    assert torch.equal(lora_fx.load(base, tmp_path)(X), adapted(X))
    torch.testing.assert_close(lora_fx.merge(adapted)(X), tuned(X), rtol=1e-5, atol=1e-5)


def test_both_models_stay_as_they_are():
    base = zoo.Mlp()
    tuned = changed(base, 2, "fc1")
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    lora_fx.extract(tuned, base)
    for model, values in zip((base, tuned), before, strict=True):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in values.items())


def test_rules_choose_sites_ranks_and_scaling():
    base = zoo.Mlp().eval()
    tuned = changed(base, 2, "fc1", "fc2")
    adapted, report = extracted(tuned, base, rules=rules("fc1", r=2, alpha=7))
    assert [(site.path, site.r) for site in report.sites] == [("fc1", 2)]
    assert [name for name, _ in report.lost] == ["fc2.weight"]
    torch.testing.assert_close(adapted.fc1(X), tuned.fc1(X), rtol=1e-5, atol=1e-5)


def test_what_differs_outside_of_linears_is_named_with_its_size():
    base = zoo.Encoder().eval()
    tuned = changed(base, 2, "classifier")
    with torch.no_grad():
        tuned.layer[0].norm1.weight[0] += 3.0
        tuned.classifier.bias[:2] += torch.tensor([3.0, 4.0])
    with pytest.warns(LoraFxWarning, match="2 tensors differ and are in no adapter") as caught:
        lora_fx.extract(tuned, base, r=2)
    assert "classifier.bias" in str(caught[0].message)
    report = extracted(tuned, base, r=2)[1]
    assert dict(report.lost) == {"layer.0.norm1.weight": pytest.approx(3.0), "classifier.bias": pytest.approx(5.0)}
    assert "lost, ‖Δ‖ = 5" in str(report)


def test_biases_and_modules_that_rules_train_are_taken_over():
    base = zoo.Encoder().eval()
    tuned = changed(base, 2, "classifier", "pooler.0")
    with torch.no_grad():
        tuned.classifier.bias += 1.0
        tuned.pooler[0].bias += 1.0
    chosen = rules("pooler.0", r=2, bias=True) | {"train": ["classifier"]}
    adapted, report = extracted(tuned, base, rules=chosen)
    assert report.lost == ()
    ids = zoo.tokens(2, 5)
    torch.testing.assert_close(adapted(ids), tuned(ids), rtol=1e-5, atol=1e-5)


def test_half_precision_is_compared_in_float32():
    base = zoo.Mlp().to(torch.bfloat16)
    tuned = changed(zoo.Mlp(), 2, "fc1")
    adapted, report = extracted(tuned, base, r=16)
    delta = tuned.fc1.weight - base.fc1.weight.float()
    product = adapted.fc1.lora_B["default"].weight @ adapted.fc1.lora_A["default"].weight
    torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-4)
    assert report.sites[0].retained == pytest.approx(1.0)


def test_tied_embedding_is_named_when_only_the_head_gets_an_adapter():
    base = zoo.Gpt().eval()
    tuned = changed(base, 2, "lm_head")
    assert [name for name, _ in extracted(tuned, base)[1].lost] == ["wte.weight"]


# -- errors


def refusals(tuned: nn.Module, base: nn.Module, **options: object) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        lora_fx.extract(tuned, base, **options)
    return caught.value


def test_two_architectures_are_refused_and_every_difference_is_named():
    base, tuned = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 5))
    assert refusals(tuned, base).refusals == (
        ("1.weight", "only in the base"),
        ("1.bias", "only in the base"),
        ("0.weight", "base (4, 4), tuned (5, 4)"),
        ("0.bias", "base (4,), tuned (5,)"),
    )
    assert ("1.weight", "only in the tuned model") in refusals(base, nn.Sequential(nn.Linear(4, 4))).refusals


def test_two_equal_models_are_refused():
    base = zoo.Mlp()
    assert "nothing to extract" in str(refusals(copy.deepcopy(base), base))


def test_values_that_are_not_finite_are_refused():
    base = zoo.Mlp()
    tuned = changed(base, 2, "fc1")
    with torch.no_grad():
        tuned.fc1.weight[0, 0] = float("nan")
    assert refusals(tuned, base).refusals == (("fc1.weight", "NaN or infinite"),)


def test_adapted_models_are_refused():
    base = zoo.Mlp()
    adapted = lora_fx.apply(base, rules("**"), backend="modules")
    assert str(refusals(adapted, base)).startswith("the tuned model has an adapter")
    assert str(refusals(base, adapted)).startswith("the base model has an adapter")


def test_models_without_values_are_refused():
    with torch.device("meta"):
        base, tuned = zoo.Mlp(), zoo.Mlp()
    assert "no values" in str(refusals(tuned, base))


def test_dora_is_refused():
    base = zoo.Mlp()
    error = refusals(changed(base, 2, "fc1"), base, rules=rules("fc1", dora=True))
    assert error.refusals == (("fc1", "only plain LoRAs are extracted: no dora, no slices"),)


def test_rule_that_matches_nothing_is_an_error():
    base = zoo.Mlp()
    with pytest.raises(NoMatchError):
        lora_fx.extract(changed(base, 2, "fc1"), base, rules=rules("fc9"))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_weights_that_accelerate_offloads_are_read_and_stay_where_they_are(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    base = zoo.Mlp()
    tuned = changed(base, 3, "fc1", "fc2")
    plain, expected = extracted(tuned, base, r=3)
    away = [copy.deepcopy(model) for model in (tuned, base)]
    for number, model in enumerate(away):
        if offload == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path / str(number)), execution_device="cpu")
    adapted, report = extracted(*away, r=3)
    assert str(report) == str(expected)
    assert torch.equal(adapted(X), plain(X))
    assert all(parameter.is_meta for model in away for parameter in model.parameters())


def test_a_model_of_which_parts_have_no_values_is_refused_and_they_are_named():
    base = zoo.Mlp()
    tuned = changed(base, 1, "fc1")
    tuned.fc2.to("meta")
    with pytest.raises(RefusedError, match=r"(?s)there are no values to compare.*fc2\.weight +has no values"):
        lora_fx.extract(tuned, base)
