"""apply: what comes back, what stays as it was, and what is refused before anything is made."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import CaptureError, LoraFxWarning, NoMatchError, RefusedError, StalePlanError
from tests.support import zoo
from tests.support.zoo import rules


def state(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a user could see: classes, attributes, flags, values."""
    return {
        "classes": [
            (name, type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()
        ],
        "flags": [(name, p.requires_grad, p.data_ptr(), p._version) for name, p in model.named_parameters()],
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


def same_state(before: dict[str, object], after: dict[str, object]) -> bool:
    values = zip(before["values"].items(), after["values"].items(), strict=True)
    equal = all(a == b and torch.equal(x, y) for (a, x), (b, y) in values)
    return equal and before["classes"] == after["classes"] and before["flags"] == after["flags"]


@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.sampled(2)
def test_callers_model_is_untouched(specimen, training):
    model = specimen.build().train(training)
    before, random = state(model), torch.get_rng_state()
    tuned = lora_fx.apply(model, rules(specimen.rule, init="random"), specimen.sample())
    for _ in range(2):
        out = tuned(*specimen.sample().args, **specimen.sample().kwargs)
        out.square().sum().backward()
    torch.optim.SGD(lora_fx.parameters(tuned), lr=0.1).step()
    assert same_state(before, state(model))
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(random)


def test_buffers_of_the_callers_model_do_not_move_when_the_adapted_model_trains():
    model = zoo.WithNorm().train()
    before = copy.deepcopy(model.state_dict())
    tuned = lora_fx.apply(model, rules("fc"), (zoo.features(4, 3),))
    for _ in range(3):
        tuned(zoo.features(4, 3))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert tuned.norm.num_batches_tracked == 3


def test_capturing_leaves_no_trace_in_the_adapted_models_buffers():
    model = zoo.WithNorm().eval()
    tuned = lora_fx.apply(model, rules("fc"), (zoo.features(4, 3),))
    assert all(torch.equal(model.state_dict()[key], tuned.state_dict()[key]) for key in model.state_dict())


@pytest.mark.parametrize("backend", ["auto", "modules"])
def test_base_weights_are_shared_and_not_copied(backend):
    model = zoo.Gpt()
    tuned = lora_fx.apply(model, rules("**.c_attn"), (zoo.tokens(2, 6),), backend=backend)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert tuned.get_parameter(name).untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert tuned.lm_head.weight is tuned.wte.weight


def test_adapted_model_keeps_class_methods_and_attributes():
    class Named(zoo.Mlp):
        def hello(self) -> str:
            return f"hello from {type(self).__name__}"

    model = Named()
    model.note = {"anything": 1}
    tuned = lora_fx.apply(model, rules("fc1"), (zoo.features(2, 3),))
    assert isinstance(tuned, Named)
    assert tuned.hello() == "hello from Named"
    assert tuned.note == {"anything": 1}
    assert isinstance(tuned.fc1, nn.Linear)
    assert type(tuned.fc1).__name__ == "Linear"


def test_only_the_adapter_is_trained():
    model = zoo.Encoder()
    tuned = lora_fx.apply(model, rules("**.{query,value}"), zoo.call_encoder())
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {
        f"layer.{i}.attention.{site}.lora_{factor}.default.weight"
        for i in range(3)
        for site in ("query", "value")
        for factor in "AB"
    }
    assert {id(p) for p in lora_fx.parameters(tuned)} == {id(p) for _, p in tuned.named_parameters() if p.requires_grad}
    assert all(p.requires_grad for p in model.parameters())


def test_first_values_are_those_of_the_paper():
    tuned = lora_fx.apply(zoo.Mlp(), rules("fc1", r=8), backend="modules")
    A, B = tuned.fc1.lora_A["default"].weight, tuned.fc1.lora_B["default"].weight
    assert A.shape == (8, 16)
    assert B.shape == (32, 8)
    assert not B.any()
    bound = math.sqrt(6 / ((1 + 5) * 16))
    assert A.abs().max() <= bound
    assert A.abs().max() > 0.9 * bound


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_other_first_values_start_at_the_base_too(init):
    tuned = lora_fx.apply(zoo.Mlp(), rules("fc1", r=8, init=init), backend="modules")
    A, B = tuned.fc1.lora_A["default"].weight, tuned.fc1.lora_B["default"].weight
    assert A.any()
    assert not B.any()
    if init == "orthogonal":
        torch.testing.assert_close(A @ A.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("extra", "scaling"), [({}, 4.0), ({"rslora": True}, 8.0)])
def test_scaling_is_alpha_over_r_or_over_its_root(extra, scaling):
    model = zoo.Mlp().eval()
    tuned = lora_fx.apply(model, rules("fc2", r=4, alpha=16, init="random", **extra), backend="modules").eval()
    x = zoo.features(2, 3)
    inner = torch.nn.functional.gelu(model.fc1(x))
    A, B = tuned.fc2.lora_A["default"].weight, tuned.fc2.lora_B["default"].weight
    torch.testing.assert_close(tuned(x), model(x) + scaling * inner @ A.T @ B.T)


def test_modules_under_train_are_trained_whole_and_apart_from_the_callers():
    model = zoo.Encoder()
    tuned = lora_fx.apply(model, rules("**.query", train=["classifier", "**.norm*"]), zoo.call_encoder())
    names = {name for name, p in tuned.named_parameters() if p.requires_grad and ".lora_" not in name}
    norms = {f"layer.{i}.norm{j}.{part}" for i in range(3) for j in (1, 2) for part in ("weight", "bias")}
    assert names == norms | {"classifier.weight", "classifier.bias"}
    before = model.classifier.weight.clone()
    tuned(zoo.tokens(2, 6)).square().sum().backward()
    torch.optim.SGD(lora_fx.parameters(tuned), lr=1.0).step()
    assert torch.equal(model.classifier.weight, before)
    assert not torch.equal(tuned.classifier.weight, before)
    assert torch.equal(lora_fx.remove(tuned).classifier.weight, before)
    assert torch.equal(lora_fx.merge(tuned).classifier.weight, tuned.classifier.weight)
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(zoo.tokens(2, 6)), model(zoo.tokens(2, 6)))


def test_training_a_tied_head_whole_leaves_the_embedding_alone():
    model = zoo.Gpt()
    tuned = lora_fx.apply(model, rules("**.c_attn", train=["lm_head"]), (zoo.tokens(2, 6),))
    assert tuned.lm_head.weight.requires_grad
    assert not tuned.wte.weight.requires_grad
    assert tuned.lm_head.weight is not tuned.wte.weight


def test_adapting_a_tied_head_leaves_the_embedding_alone_before_and_after_merging():
    model = zoo.Gpt().eval()
    tuned = lora_fx.apply(model, rules("lm_head", init="random"), (zoo.tokens(2, 6),))
    merged = lora_fx.merge(tuned)
    assert torch.equal(merged.wte.weight, model.wte.weight)
    assert not torch.equal(merged.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(merged(zoo.tokens(2, 6)), tuned(zoo.tokens(2, 6)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_get_float32_adapters_and_keep_their_own_dtype(dtype):
    model = zoo.Encoder().to(dtype).eval()
    tuned = lora_fx.apply(model, rules("**.{query,intermediate}"), (zoo.tokens(2, 6),))
    assert {p.dtype for p in lora_fx.parameters(tuned)} == {torch.float32}
    assert torch.equal(tuned(zoo.tokens(3, 5)), model(zoo.tokens(3, 5)))
    zoo.randomise_(tuned)
    assert tuned(zoo.tokens(3, 5)).dtype == dtype
    assert {p.dtype for p in lora_fx.merge(tuned).parameters()} == {dtype}


def test_autocast_keeps_the_adapted_model_bit_equal_to_its_base():
    model = zoo.Encoder().eval()
    tuned = lora_fx.apply(model, rules("**.query"), (zoo.tokens(2, 6),))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(tuned(zoo.tokens(3, 5)), model(zoo.tokens(3, 5)))


# -- refused


def test_misspelt_rule_is_an_error_and_names_what_is_near():
    model = zoo.Encoder()
    before = state(model)
    with pytest.raises(NoMatchError) as caught:
        lora_fx.apply(model, rules("**.qurey"))
    assert caught.value.nearest[0] == "layer.0.attention.query"
    assert same_state(before, state(model))


def test_applying_twice_is_refused():
    tuned = lora_fx.apply(zoo.Mlp(), rules("fc1"), backend="modules")
    with pytest.raises(RefusedError, match="adapted already"):
        lora_fx.apply(tuned, rules("fc2"))


def test_compiled_model_is_refused_with_the_way_out():
    with pytest.raises(RefusedError, match=r"adapt the model first, then torch\.compile it"):
        lora_fx.apply(torch.compile(zoo.Mlp()), rules("**"))


def test_lazy_model_is_refused_with_the_way_out():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(RefusedError) as caught:
        lora_fx.apply(model, rules("1"), backend="modules")
    assert caught.value.refusals == (("0.weight", "not initialised"), ("0.bias", "not initialised"))


def test_model_that_cannot_be_copied_is_refused_and_the_part_named():
    import threading

    model = zoo.Mlp()
    model.fc2.lock = threading.Lock()
    with pytest.raises(RefusedError) as caught:
        lora_fx.apply(model, rules("fc1"), backend="modules")
    assert caught.value.refusals[0][0] == "fc2.lock"


def test_inputs_that_the_model_refuses_are_an_error():
    model = zoo.Encoder()
    with pytest.raises(CaptureError, match="refuses the example inputs") as caught:
        lora_fx.apply(model, rules("**.query"), (torch.randn(2, 6),))
    assert "RuntimeError" in str(caught.value)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), 7, [], "text", [torch.zeros(2)]], ids=repr)
def test_inputs_of_a_wrong_kind_are_an_error(inputs):
    with pytest.raises(CaptureError, match="example_inputs is"):
        lora_fx.apply(zoo.Mlp(), rules("fc1"), inputs)


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="'auto', 'graph' or 'modules'"):
        lora_fx.apply(zoo.Mlp(), rules("fc1"), backend="fx")


def test_graph_backend_refuses_sites_that_are_in_no_graph():
    specimen = next(specimen for specimen in zoo.ZOO if specimen.name == "branching")
    with pytest.raises(CaptureError) as caught:
        lora_fx.apply(specimen.build(), rules("**"), specimen.sample(), backend="graph")
    refused = dict(caught.value.failures)
    assert list(refused) == ["blocks.0.branch.first", "blocks.1.branch.first"]
    assert set(refused.values()) == {"never used with the example inputs"}


def test_rule_whose_every_match_is_refused_is_an_error():
    with pytest.raises(RefusedError, match="every site that rule 'rule 1' matches is refused"):
        lora_fx.apply(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), rules("0"))


def test_partly_refused_rule_warns_and_names_the_sites():
    model = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4))
    with pytest.warns(LoraFxWarning, match=r"0: max_norm rescales the rows"):
        lora_fx.apply(model, rules("{0,1}"), backend="modules")


def test_rank_above_the_smaller_side_warns():
    with pytest.warns(LoraFxWarning, match=r"fc1: r = 64 is above min\(in, out\) = 16"):
        lora_fx.apply(zoo.Mlp(), rules("fc1", r=64), backend="modules")


def test_linears_whose_weight_is_computed_are_refused_with_the_reason_and_the_way_out():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    (first, _) = lora_fx.plan(model, rules("**")).sites
    assert first.decision == "refuse"
    assert "computed by a parametrization; remove it" in first.reason


# -- plans


def test_applying_a_plan_adapts_what_the_plan_says():
    model = zoo.Gpt()
    plan = lora_fx.plan(model, rules("**.c_attn"), (zoo.tokens(2, 6),))
    tuned = lora_fx.apply(model, plan)
    assert [site.path for site in lora_fx.inspect(tuned).sites] == [site.path for site in plan.adapted]
    assert {site.backend for site in lora_fx.inspect(tuned).sites} == {"graph"}


def test_stale_plan_is_refused_and_every_difference_named():
    plan = lora_fx.plan(zoo.Encoder(width=16, layers=2), rules("**.query"))
    with pytest.raises(StalePlanError) as caught:
        lora_fx.apply(zoo.Encoder(width=32, layers=1), plan)
    differences = {path: (planned, difference) for path, planned, difference in caught.value.differences}
    assert differences["layer.0.attention.query"] == ("Linear 16 → 16", "Linear 32 → 32")
    assert differences["layer.1.attention.query"] == ("Linear 16 → 16", "nothing")


def test_plan_that_trains_a_module_of_another_size_is_stale():
    plan = lora_fx.plan(zoo.WithNorm(), rules("fc", train=["norm"]))
    other = zoo.WithNorm()
    other.norm = nn.Identity()
    with pytest.raises(StalePlanError) as caught:
        lora_fx.apply(other, plan)
    assert caught.value.differences == (("norm", "16 parameters", "0 parameters"),)


def test_plan_read_from_json_needs_the_inputs_again():
    model = zoo.Gpt()
    plan = lora_fx.Plan.from_json(lora_fx.plan(model, rules("**.c_attn"), (zoo.tokens(2, 6),)).to_json())
    with pytest.raises(CaptureError, match="another process"):
        lora_fx.apply(model, plan)
    tuned = lora_fx.apply(model, plan, (zoo.tokens(2, 6),))
    assert {site.backend for site in lora_fx.inspect(tuned).sites} == {"graph"}


# -- copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
@pytest.mark.sampled(2)
def test_copies_of_an_adapted_model_compute_the_same_with_weights_of_their_own(specimen, duplicate):
    tuned = lora_fx.apply(specimen.build(), rules(specimen.rule, init="random"), specimen.sample()).eval()
    other = duplicate(tuned)
    args, kwargs = specimen.inputs(3, 6)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(other(*args, **kwargs), tuned(*args, **kwargs))
        before = tuned(*args, **kwargs)
        for parameter in lora_fx.parameters(other):
            parameter.zero_()
        assert torch.equal(tuned(*args, **kwargs), before)
        assert not torch.equal(other(*args, **kwargs), before)
    assert lora_fx.inspect(other).trainable == lora_fx.inspect(tuned).trainable


def test_merged_model_needs_no_lora_fx(tmp_path):
    tuned = lora_fx.apply(
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), rules("0", r=2, init="random"), backend="modules"
    )
    torch.save(lora_fx.merge(tuned), tmp_path / "merged.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['lora_fx'] = None\n"
        f"model = torch.load({str(tmp_path / 'merged.pt')!r}, weights_only=False)\n"
        "print(type(model).__name__, all(p.requires_grad for p in model.parameters()), len(model(torch.ones(1, 4))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Sequential", "True", "1"]


def test_merging_what_is_not_finite_changes_nothing_and_names_the_site():
    tuned = lora_fx.apply(zoo.Mlp(), rules("**", init="random"), backend="modules")
    with torch.no_grad():
        tuned.fc2.lora_A["default"].weight[0, 0] = float("nan")
    before = tuned.fc1.weight.clone()
    with pytest.raises(lora_fx.MergeError) as caught:
        lora_fx.merge(tuned)
    assert caught.value.problems == (("fc2", "the merged weight has NaN or infinite values"),)
    assert torch.equal(tuned.fc1.weight, before)


@pytest.mark.parametrize("function", [lora_fx.merge, lora_fx.remove, lora_fx.inspect], ids=lambda kind: kind.__name__)
def test_functions_of_adapted_models_refuse_a_plain_one(function):
    with pytest.raises(RefusedError, match="the model is not adapted"):
        function(zoo.Mlp())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, found str"):
        function("adapter")


def test_report_shows_repeated_blocks_as_one():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(12)))
    text = str(lora_fx.inspect(lora_fx.apply(blocks, rules("*.0"), backend="modules")))
    assert "{0..11}.0  ×12" in text
    assert len(text.splitlines()) == 5
