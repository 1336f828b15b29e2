"""Several adapters on one model: added, chosen, weighted, dropped, renamed; each as if it were alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.discovery.sites import take_inventory, uses_in
from lora_fx.regions.install import regions
from lora_fx.tuned.build import whole_record_in
from tests.support.twoadapters import BACKENDS, BOTH, DORA, WIDE, alone, factors, given, model, pairs, two, values


@BACKENDS
def test_an_added_adapter_changes_nothing_until_it_is_used(inputs):
    tuned = alone(BOTH, "a", inputs)
    expected, before = tuned(given()), values(tuned)
    lora_fx.add(tuned, alone(WIDE, "b"), adapter="b")
    assert torch.equal(tuned(given()), expected)
    assert all(torch.equal(values(tuned)[name], tensor) for name, tensor in before.items())


@BACKENDS
def test_each_adapter_computes_what_it_computes_alone(inputs):
    tuned = two(inputs)
    for rules, name in ((BOTH, "a"), (WIDE, "b")):
        lora_fx.use(tuned, name)
        assert torch.equal(tuned(given()), alone(rules, name, inputs)(given()))


@BACKENDS
def test_without_an_adapter_it_computes_what_the_base_computes(inputs):
    tuned = two(inputs)
    lora_fx.use(tuned, None)
    assert torch.equal(tuned(given()), model()(given()))


@BACKENDS
@pytest.mark.parametrize("chosen", [["a", "b"], {"a": 0.5, "b": -2.0}, {"b": 0.25}])
def test_several_adapters_add_their_weighted_changes(inputs, chosen):
    tuned = two(inputs)
    lora_fx.use(tuned, chosen)
    expected = model()
    weights = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, 1.0)
    for name, weight in weights.items():
        for path, factor in factors(tuned, name).items():
            if path.endswith("lora_A"):
                B = factors(tuned, name)[path.replace("lora_A", "lora_B")]
                layer = expected.get_submodule(path.removesuffix(".lora_A"))
                layer.weight.data += weight * {"a": 2.0, "b": 1.0}[name] * B @ factor
    assert torch.allclose(tuned(given()), expected(given()), atol=1e-6)


def test_dora_is_mixed_as_the_weights_say():
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, alone(DORA, "b"), adapter="d")
    base, plain = model().blocks[0].q, copy.deepcopy(tuned.blocks[0].q)
    x = given()
    lora_fx.use(tuned, {"default": 1.0})
    with_plain = tuned.blocks[0].q(x)
    lora_fx.use(tuned, "d")
    with_dora = tuned.blocks[0].q(x)
    lora_fx.use(tuned, {"default": 0.5, "d": 0.25})
    expected = base(x) + 0.5 * (with_plain - base(x)) + 0.25 * (with_dora - base(x))
    assert torch.allclose(tuned.blocks[0].q(x), expected, atol=1e-6)
    assert type(plain).__name__ == "Linear"


@BACKENDS
def test_two_hundred_changes_leave_every_bit_as_it_was(inputs):
    tuned = two(inputs)
    expected, before = tuned(given()), values(tuned)
    for number in range(200):
        lora_fx.use(tuned, (["a"], ["b"], None, {"a": 0.3, "b": 0.7})[number % 4])
    lora_fx.use(tuned, "a")
    assert torch.equal(tuned(given()), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in values(tuned).items())


def test_adding_and_using_captures_nothing():
    tuned = two((given(),))
    for chosen in ("a", "b", None, ["a", "b"]):
        lora_fx.use(tuned, chosen)
        tuned(given())
    found = [region for _, _, region in regions(tuned)]
    assert len(found) == 3
    assert sum(region.captures for region in found) == 0
    assert all(region.block.programs for region in found)
    before = sum(region.hits for region in found)
    tuned(given())
    assert sum(region.hits for region in found) == before + 3


@BACKENDS
def test_training_one_adapter_leaves_the_other_and_the_base_alone(inputs):
    tuned = two(inputs)
    lora_fx.use(tuned, "b")
    before = values(tuned)
    tuned(given()).square().sum().backward()
    moved = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert moved == {name for name in before if ".b.weight" in name}


@BACKENDS
def test_gradients_of_mixed_adapters_are_those_of_the_formula(inputs):
    tuned = two(inputs)
    lora_fx.use(tuned, {"a": 0.5, "b": 2.0})
    tuned(given()).square().sum().backward()
    step = 1e-3
    name, parameter = next((n, p) for n, p in tuned.named_parameters() if n.endswith("1.k.lora_B.b.weight"))
    gradient = parameter.grad[2, 1].item()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[2, 1] += sign * step
            losses.append(tuned.double()(given().double()).square().sum().item())
            parameter[2, 1] -= sign * step
    assert name
    assert gradient == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-3)


def test_a_choice_in_a_with_statement_ends_with_it_and_other_threads_do_not_see_it():
    tuned = two()
    expected = {name: (lora_fx.use(tuned, name), tuned(given()))[1] for name in ("a", "b")}
    lora_fx.use(tuned, "a")
    seen: list[bool] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(torch.equal(tuned(given()), expected["a"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(300):
        with lora_fx.use(tuned, "b"):
            assert torch.equal(tuned(given()), expected["b"])
        with lora_fx.disabled(tuned):
            assert torch.equal(tuned(given()), model()(given()))
    stop.set()
    watcher.join()
    assert seen
    assert all(seen)
    assert torch.equal(tuned(given()), expected["a"])


def test_choices_nest_and_a_context_is_entered_once():
    tuned = two()
    with lora_fx.use(tuned, "b"), lora_fx.use(tuned, None):
        assert torch.equal(tuned(given()), model()(given()))
    choice = lora_fx.use(tuned, "b")
    with choice, pytest.raises(RuntimeError, match="holds already"):
        choice.__enter__()
    assert lora_fx.list_adapters(tuned)["a"].active  # as before `choice` was made


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_is_run_again_in_the_backward_pass_uses_what_it_used_before(reentrant):
    tuned = two()
    layer = tuned.blocks[0]

    def gradients(checkpointed: bool) -> list[Tensor]:
        tuned.zero_grad()
        x = given().requires_grad_()
        with lora_fx.use(tuned, "b"):
            y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()  # after the choice has ended
        return [x.grad, *(p.grad for _, p in sorted(layer.named_parameters()) if p.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) == 5
    # a reentrant checkpoint computes its forward without gradients, whose products round otherwise
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, again, strict=True))


def test_copies_and_pickles_keep_their_adapters_and_choose_for_themselves(tmp_path):
    tuned = two((given(),))
    lora_fx.use(tuned, "b")
    expected = tuned(given())
    twin, read = copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))
    lora_fx.use(tuned, "a")
    assert torch.equal(twin(given()), expected)
    assert torch.equal(read(given()), expected)
    lora_fx.use(twin, None)
    assert torch.equal(read(given()), expected)


@BACKENDS
def test_a_dropped_adapter_is_gone_and_the_other_as_before(inputs):
    tuned = two(inputs)
    expected = tuned(given())
    lora_fx.drop(tuned, "b")
    assert torch.equal(tuned(given()), expected)
    assert not any(".b." in name for name in tuned.state_dict())
    base = lora_fx.remove(tuned)
    assert set(base.state_dict()) == set(model().state_dict())
    assert [type(module) for module in base.modules()] == [type(module) for module in model().modules()]


def test_an_adapter_that_is_dropped_while_used_leaves_the_rest_in_use():
    tuned = two()
    lora_fx.use(tuned, ["a", "b"])
    lora_fx.drop(tuned, "a")
    assert torch.equal(tuned(given()), alone(WIDE, "b")(given()))


def test_the_only_adapter_is_not_dropped():
    with pytest.raises(lora_fx.RefusedError, match=r"only adapter.*\n.*lora_fx.remove"):
        lora_fx.drop(alone(BOTH, "a"), "default")


@pytest.mark.parametrize("name", ["train", "weight", "forward"])
def test_adapters_bear_names_that_modules_have_for_something_else(name, tmp_path):
    tuned = two((given(),))
    lora_fx.rename(tuned, "b", name)
    lora_fx.use(tuned, name)
    assert torch.equal(tuned(given()), alone(WIDE, "b")(given()))
    tuned.train().eval()
    twin = copy.deepcopy(tuned)
    twin.load_state_dict(tuned.state_dict())
    assert torch.equal(twin(given()), tuned(given()))


def test_adapters_are_listed_with_what_is_used_of_them():
    tuned = two()
    lora_fx.use(tuned, {"a": 0.5})
    a, b = lora_fx.list_adapters(tuned)
    assert (a.name, a.sites, a.weight, a.active, a.dtype) == ("a", 6, 0.5, True, "float32")
    assert (b.name, b.sites, b.parameters, b.active) == ("b", 6, 6 * 2 * 3 * 6, False)
    norms = [float(torch.linalg.norm(B @ A)) for A, B in pairs(tuned, "b")]
    assert b.norm == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)
    assert "used, 0.5 of it" in str(lora_fx.list_adapters(tuned))
    lora_fx.use(tuned, "b")
    assert repr(lora_fx.list_adapters(tuned)) == "<AdapterList: a, b (used)>"


def test_rows_biases_and_modules_that_are_trained_are_counted():
    rules = {
        "version": 1,
        "tokens": [{"name": "words", "ids": [1, 4, 5]}],
        "train": ["norm"],
        "rules": [{"match": {"name": "q"}, "lora": {"r": 2, "bias": True}}],
    }
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "norm": nn.LayerNorm(4), "q": nn.Linear(4, 3)})
    tuned = lora_fx.apply(model, rules, backend="modules")
    (one,) = lora_fx.list_adapters(tuned)
    assert (one.sites, one.token_rows, one.whole) == (1, 3, 2 * 4 + 3)
    assert one.parameters == sum(parameter.numel() for parameter in lora_fx.parameters(tuned)) == 14 + 12 + 11
    assert str(lora_fx.list_adapters(tuned)).endswith("3 rows of tokens, 11 of the model itself")


def test_an_adapter_from_rules_starts_as_apply_starts_it_and_may_be_frozen():
    tuned = alone(BOTH, "a")
    rules = {"version": 1, "rules": [{"match": {"name": "**.out"}, "lora": {"r": 2}}]}
    lora_fx.add(tuned, rules, adapter="new", trainable=False)
    assert not lora_fx.list_adapters(tuned)["new"].trainable
    lora_fx.use(tuned, "new")
    assert torch.equal(tuned(given()), model()(given()))


def test_an_adapter_is_added_by_target_and_rank_as_apply_takes_them():
    tuned = alone(BOTH, "a")
    lora_fx.add(tuned, r=3, target=["q"], adapter="b")
    assert {A.shape[0] for A, _ in pairs(tuned, "b")} == {3}
    assert {path.split(".")[-2] for path in factors(tuned, "b")} == {"q"}
    before = values(tuned)
    with pytest.raises(lora_fx.RuleError, match="cannot stand beside rules"):
        lora_fx.add(tuned, BOTH, r=3, adapter="c")
    with pytest.raises(lora_fx.RuleError, match="nothing says what"):
        lora_fx.add(tuned, adapter="c")
    assert values(tuned).keys() == before.keys()


def test_an_adapter_from_a_directory_is_the_one_that_was_saved(tmp_path):
    lora_fx.save(alone(WIDE, "b"), tmp_path / "b")
    tuned = alone(BOTH, "a", (given(),))
    lora_fx.add(tuned, tmp_path / "b", adapter="b")
    lora_fx.use(tuned, "b")
    assert torch.equal(tuned(given()), alone(WIDE, "b")(given()))


def test_nothing_is_changed_by_an_adapter_that_does_not_fit(tmp_path):
    lora_fx.save(alone(WIDE, "b"), tmp_path / "b")
    with torch.no_grad():
        other = model()
        other.blocks[0].out.weight += 1
    tuned = lora_fx.apply(other, BOTH, backend="modules")
    before = values(tuned)
    with pytest.raises(lora_fx.AdapterMismatchError, match="another base"):
        lora_fx.add(tuned, tmp_path / "b", adapter="b")
    assert list(values(tuned)) == list(before)
    assert len(lora_fx.list_adapters(tuned)) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("c", "no adapter is called 'c'; there are a, b"),
        ({"a": float("nan")}, "weights must be finite numbers: a: nan"),
        ({"a": "1"}, "weights must be finite numbers: a: '1'"),
        (["a", "a"], "an adapter is named twice"),
    ],
)
def test_a_choice_that_cannot_be_changes_nothing(chosen, message):
    tuned = two()
    with pytest.raises(ValueError, match=message):
        lora_fx.use(tuned, chosen)
    assert lora_fx.list_adapters(tuned)["a"].weight == 1


@pytest.mark.parametrize(
    ("name", "message"), [("a", "there is an adapter called 'a' already"), ("a.b", "cannot be called")]
)
def test_names_that_are_taken_or_none_are_refused(name, message):
    tuned = two()
    with pytest.raises(ValueError, match=message):
        lora_fx.rename(tuned, "b", name)
    with pytest.raises(ValueError, match=message):
        lora_fx.add(tuned, BOTH, adapter=name)


def test_modules_that_are_trained_whole_belong_to_the_adapters_that_were_trained_with_them():
    tuned = lora_fx.apply(model(), {**BOTH, "train": ["blocks.0.out"]}, backend="modules")
    lora_fx.add(tuned, {"version": 1, "rules": [{"match": {"name": "**.k"}, "lora": {"r": 2}}]}, adapter="b")
    with torch.no_grad():
        tuned.blocks[0].out.weight += 1
    lora_fx.use(tuned, "b")
    assert torch.equal(tuned(given()), model()(given()))
    lora_fx.use(tuned, ["default", "b"])
    assert torch.equal(tuned.blocks[0].out.weight, tuned.get_parameter("blocks.0.out.weight"))
    with pytest.raises(lora_fx.RefusedError, match="cannot be dropped"):
        lora_fx.drop(tuned, "default")


def test_adapters_that_were_trained_with_one_module_are_used_together_or_not_at_all():
    rules = [{"match": {"name": f"**.{name}"}, "lora": {"r": 2, "adapter": name}} for name in ("q", "k")]
    tuned = lora_fx.apply(model(), {"version": 1, "rules": rules, "train": ["blocks.0.out"]}, backend="modules")
    with pytest.raises(lora_fx.RefusedError, match=r"blocks.0.out.weight.*was trained with q, k together"):
        lora_fx.use(tuned, "q")
    lora_fx.use(tuned, ["q", "k"])


def test_an_added_adapter_that_starts_as_a_part_of_its_weight_starts_at_the_base():
    tuned = alone(BOTH, "a")
    rules = {"version": 1, "rules": [{"match": {"name": "**.out"}, "lora": {"r": 2, "init": "pissa"}}]}
    lora_fx.add(tuned, rules, adapter="parts")
    assert all(A.any() and B.any() for A, B in pairs(tuned, "parts"))
    lora_fx.use(tuned, "parts")
    assert torch.equal(tuned(given()), model()(given()))


def test_what_a_plan_knows_of_the_base_is_what_the_base_shows():
    tuned = two((given(),))
    plan = whole_record_in(tuned).plan
    shown = take_inventory(lora_fx.remove(tuned), uses_in(plan))
    assert tuple(planned.site for planned in plan.sites) == shown.sites
    assert (plan.model, plan.total) == (shown.model, shown.total)


@pytest.mark.parametrize("choice", [lambda tuned: lora_fx.use(tuned, None), lora_fx.disabled], ids=["use", "disabled"])
def test_choices_that_end_in_another_order_leave_nothing_behind(choice):
    tuned = two()
    expected = tuned(given())

    def chosen() -> Iterator[None]:
        with choice(tuned):
            yield

    first, second = chosen(), chosen()
    next(first)
    next(second)
    first.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert torch.equal(tuned(given()), expected)
