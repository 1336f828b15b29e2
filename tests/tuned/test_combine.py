"""One adapter out of several: exactly, nearly, and as PEFT does it."""

from __future__ import annotations

import copy

import pytest
import torch

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.twoadapters import BACKENDS, BOTH, DORA, alone, factors, given, model, two, values

WEIGHTS = {"a": 0.7, "b": -1.5}


def rules(r: int, alpha: float, **lora):
    rule = {"match": {"name": "**.{q,k}"}, "lora": {"r": r, "alpha": alpha, "init": "random", **lora}}
    return {"version": 1, "rules": [rule]}


def alike(r: int = 3):
    """Return a model with "a" and "b" at the same sites, with other scalings."""
    torch.manual_seed(1)
    tuned = lora_fx.apply(model(), rules(r, 6), backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, rules(r, 3), adapter="b")
    return tuned


@BACKENDS
def test_cat_computes_what_the_weighted_adapters_compute(inputs):
    tuned = two(inputs)
    before = values(tuned)
    lora_fx.combine(tuned, WEIGHTS, adapter="ab")
    assert [one.name for one in lora_fx.list_adapters(tuned) if one.active] == ["a"]
    assert all(torch.equal(tuned.state_dict()[name], tensor) for name, tensor in before.items())
    lora_fx.use(tuned, WEIGHTS)
    expected = tuned(given())
    lora_fx.use(tuned, "ab")
    assert torch.allclose(tuned(given()), expected, atol=1e-6)
    ranks = {path: one.shape[0] for path, one in factors(tuned, "ab").items() if "lora_A" in path}
    assert (ranks["blocks.0.q.lora_A"], ranks["blocks.0.k.lora_A"], ranks["blocks.0.out.lora_A"]) == (2, 5, 3)


def test_svd_of_enough_rank_is_exact_and_of_less_the_nearest():
    tuned = two()
    lora_fx.combine(tuned, WEIGHTS, adapter="whole", method="svd", r=5)
    lora_fx.combine(tuned, WEIGHTS, adapter="less", method="svd", r=2)
    layer = tuned.blocks[0].k
    exact = sum(
        weight * scaling * layer.lora_B[name].weight @ layer.lora_A[name].weight
        for name, weight, scaling in (("a", 0.7, 2.0), ("b", -1.5, 1.0))
    )
    whole, less = (layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("whole", "less"))
    assert torch.allclose(whole, exact, atol=1e-6)
    rest = torch.linalg.svdvals(exact)[2:].norm()
    assert torch.allclose((less - exact).norm(), rest, atol=1e-6)


METHODS = ["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS += ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


def in_peft(tuned, method, **options):
    """Return ΔW of PEFT's combination of the same adapters at each site."""
    peft = pytest.importorskip("peft")
    config = {"r": 3, "target_modules": ["q", "k"]}
    theirs = peft.get_peft_model(copy.deepcopy(model()), peft.LoraConfig(lora_alpha=6, **config), "one")
    theirs.add_adapter("two", peft.LoraConfig(lora_alpha=3, **config))
    for name, its in (("a", "one"), ("b", "two")):
        for path, factor in factors(tuned, name).items():
            theirs.base_model.model.get_parameter(f"{path}.{its}.weight").data.copy_(factor)
    inject = theirs.base_model.inject_adapter

    def seeded(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(4)  # fresh factors have drawn numbers

    theirs.base_model.inject_adapter = seeded
    theirs.add_weighted_adapter(["one", "two"], list(WEIGHTS.values()), "both", combination_type=method, **options)
    layers = {path: theirs.base_model.model.get_submodule(path) for path in ("blocks.0.q", "blocks.2.k")}
    return {path: layer.get_delta_weight("both").detach() for path, layer in layers.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_what_pefts_makes(method):
    tuned = alike()
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    ranks = {"r": 4} if method.endswith("svd") else {}
    lora_fx.combine(tuned, WEIGHTS, adapter="ab", method=method, seed=4, **options, **ranks)
    expected = in_peft(tuned, method, **options, **({"svd_rank": 4} if ranks else {}))
    assert_made(tuned, expected)


def assert_made(tuned, expected):
    for path, delta in expected.items():
        layer = tuned.get_submodule(path)
        made = layer.lora_B["ab"].weight @ layer.lora_A["ab"].weight
        assert torch.allclose(made, delta, atol=1e-5)
        assert delta.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_of_adapters_in_half_precision_only_the_result_is_rounded(method, dtype):
    options = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    made = []
    for wide in (torch.float32, torch.float64):
        tuned = alike().to(dtype).to(wide if wide == torch.float64 else dtype)
        lora_fx.combine(tuned, WEIGHTS, adapter="ab", method=method, seed=4, **options)
        layer = tuned.blocks[0].q
        made.append(layer.lora_B["ab"].weight.double() @ layer.lora_A["ab"].weight.double())
    assert (made[0] - made[1]).norm() < 1e-6 * made[1].norm()


def test_the_majority_may_be_counted():
    tuned = alike()
    lora_fx.combine(tuned, WEIGHTS, adapter="ab", method="ties", density=0.6, majority="frequency")
    assert_made(tuned, in_peft(tuned, "ties", density=0.6, majority_sign_method="frequency"))


def test_dare_is_dare_linear():
    tuned = alike()
    for name, method in (("x", "dare"), ("y", "dare_linear")):
        lora_fx.combine(tuned, WEIGHTS, adapter=name, method=method, density=0.5, seed=1)
    assert all(torch.equal(one, factors(tuned, "y")[name]) for name, one in factors(tuned, "x").items())


def test_the_same_seed_drops_the_same():
    tuned = alike()
    before = torch.random.get_rng_state()
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        lora_fx.combine(tuned, WEIGHTS, adapter=name, method="dare_linear", density=0.5, seed=seed)
    x, y, z = (factors(tuned, name)["blocks.0.q.lora_A"] for name in "xyz")
    assert torch.equal(x, y)
    assert not torch.equal(x, z)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("training", ["a", "b"])
def test_adapters_that_train_modules_of_the_model_are_refused_by_name(training):
    head = {"train": ["blocks.2.out"]}
    tuned = lora_fx.apply(model(), rules(3, 6, adapter="a") | (head if training == "a" else {}), backend="modules")
    lora_fx.add(tuned, rules(3, 3) | (head if training == "b" else {}), adapter="b")
    before = values(tuned)
    with pytest.raises(RefusedError, match=rf"blocks\.2\.out +'{training}' trains it"):
        lora_fx.combine(tuned, ["a", "b"], adapter="ab")
    assert values(tuned).keys() == before.keys()
    other = "b" if training == "a" else "a"
    lora_fx.combine(tuned, [other], adapter="alone")


def test_a_combined_adapter_is_saved_dropped_and_frozen_like_any(tmp_path):
    tuned = two()
    lora_fx.combine(tuned, ["a", "b"], adapter="ab", trainable=False)
    assert not any(factor.requires_grad for factor in lora_fx.parameters(tuned, "ab"))
    lora_fx.save(tuned, tmp_path, adapter="ab")
    back = lora_fx.load(model(), tmp_path)
    lora_fx.use(tuned, "ab")
    assert torch.equal(back(given()), tuned(given()))
    lora_fx.use(tuned, "a")
    lora_fx.drop(tuned, "ab")
    assert values(tuned).keys() == values(two()).keys()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "mean"}, "must be one of cat, linear"),
        ({"adapters": {"c": 1.0}}, "no adapter is called 'c'"),
        ({"adapters": {"a": 0.0}}, "no adapter has a weight"),
        ({"adapter": "a"}, "'a' already"),
        ({"method": "ties"}, "density is None"),
        ({"method": "ties", "density": 1.5}, r"density is 1\.5"),
        ({"density": 0.5}, "prunes nothing"),
        ({"r": 3}, "r is 3"),
        ({"method": "svd", "r": 1.5}, r"r is 1\.5"),
        ({"method": "svd", "r": "2"}, "r is '2'"),
        ({"method": "ties", "density": "half"}, "density is 'half'"),
        ({"method": "dare", "density": 0.5, "seed": None}, "seed is None"),
        ({"trainable": None}, "trainable is None"),
        ({"adapter": 3}, "cannot be called 3"),
        ({"adapters": 3}, "adapters must be a name.*found int"),
        ({"majority": "most"}, "majority is 'most'"),
    ],
)
def test_what_cannot_be_meant_is_an_error(options, told):
    tuned = alike()
    before = values(tuned).keys()
    with pytest.raises(ValueError, match=told):
        lora_fx.combine(tuned, **{"adapters": WEIGHTS, "adapter": "ab", **options})
    assert values(tuned).keys() == before


def test_factors_that_cannot_be_summed_are_refused():
    with pytest.raises(lora_fx.RefusedError, match="not all adapters have it"):
        lora_fx.combine(two(), WEIGHTS, adapter="ab", method="linear")
    tuned = alike()
    lora_fx.add(tuned, rules(2, 2), adapter="c")
    with pytest.raises(ValueError, match="equal ranks"):
        lora_fx.combine(tuned, ["a", "c"], adapter="ac", method="linear")


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (DORA, "is DoRA"),
        (
            {"rules": [{**DORA["rules"][0], "lora": {"r": 2}, "slices": {"of": ["x", "y"], "adapt": ["x"]}}]},
            "adapts slices",
        ),
    ],
)
def test_kinds_that_are_no_product_are_refused(made, told):
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, made, adapter="d")
    with pytest.raises(lora_fx.RefusedError, match=told):
        lora_fx.combine(tuned, ["default", "d"], adapter="x")
