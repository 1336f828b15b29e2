"""Linears of compressed-tensors, hqq and quanto: the base stays codes, the adapter is exact beside it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import RefusedError
from tests.support.besidepeft import losses_of_both
from tests.support.codedmodels import INT4, KINDS, PATHS, compress_, copied, expected_of, hqq, numbers, plain
from tests.support.sitekinds import randomise_, result_and_gradient

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
INT4_KIND = "compressed-tensors W4A16"
ONE_OF_EACH = [INT4_KIND, "compressed-tensors W8A8", "hqq 4 bits", "quanto int8"]


def rules(**rule: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": ["**.up", "**.down"]}, "lora": {"r": 4, **rule}}]}


def tuned_of(model: nn.Module, **rule: Any) -> nn.Module:
    tuned = lora_fx.apply(model, rules(**rule), (X,))
    randomise_(tuned)
    return tuned


def dense_twin(tuned: nn.Module) -> nn.Module:
    """Return the same blocks with plain linears on W + scaling · B A of dequantised W."""
    model = plain()
    for path in PATHS:
        layer, own = tuned.get_submodule(path), model.get_submodule(path)
        A, B = layer.lora_A.default, layer.lora_B.default.weight
        own.weight.data = (numbers(layer) + A.spec.scaling * (B @ A.weight)).detach()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_exact_beside_codes_which_stay_where_they_are(kind: str):
    model = KINDS[kind]()
    before = {name: (type(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    expected = expected_of(model, X)
    tuned = lora_fx.apply(model, rules(), (X,))
    assert torch.equal(tuned(X), expected), "B = 0"
    assert {site.backend for site in lora_fx.inspect(tuned).sites} == {"graph"}
    own = dict(tuned.named_parameters())
    assert all((type(own[name]), own[name].data_ptr()) == known for name, known in before.items()), "no code is copied"
    assert not any(own[name].requires_grad for name in before)
    randomise_(tuned)
    twin, tolerance = dense_twin(tuned), 3e-2 if "W8A8" in kind else 1e-5  # which rounds its inputs as well
    (result, grad), (wanted, wanted_grad) = result_and_gradient(tuned, X), result_and_gradient(twin, X)
    assert (result - wanted).norm() <= tolerance * wanted.norm()
    assert (grad - wanted_grad).norm() <= tolerance * wanted_grad.norm(), "gradients pass through the base"
    merged = lora_fx.merge(tuned)
    assert {type(merged.get_submodule(path)) for path in PATHS} == {nn.Linear}
    assert (merged(X) - wanted).norm() <= 1e-5 * wanted.norm()
    removed = lora_fx.remove(tuned)
    assert torch.equal(removed(X), expected)
    assert list(removed.state_dict()) == keys
    assert {name: (type(p), p.data_ptr()) for name, p in model.named_parameters()} == before, "nothing is decompressed"
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(X), expected), "the model that was given goes on as before"
    assert torch.equal(tuned(X), result), "and so does the adapted one"


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_modules_states_files_copies_autocast_and_checkpoints(kind: str, tmp_path: Path):
    model = KINDS[kind]()
    tuned = tuned_of(model, dropout=0.5)
    in_modules = lora_fx.apply(model, rules(dropout=0.5), (X,), backend="modules")
    lora_fx.load_adapter_state(in_modules, lora_fx.adapter_state(tuned))
    for training in (True, False):
        results = []
        for one in (tuned, in_modules):
            torch.manual_seed(3)
            results.append(result_and_gradient(one.train(training), X))
        assert all(map(torch.equal, *results))
    expected = tuned(X)
    state = tuned.state_dict()
    assert {name for name in state if "lora_" in name} == set(lora_fx.adapter_state(tuned))
    lora_fx.save(tuned, tmp_path / "adapter")
    assert torch.equal(lora_fx.load(model, tmp_path / "adapter").eval()(X), expected)
    if "quanto" in kind:  # 0.2.7: no model that holds its codes can be copied so
        with pytest.raises(RuntimeError, match="__deepcopy__"):
            copy.deepcopy(model)
    else:
        assert torch.equal(copy.deepcopy(tuned)(X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        result, grad = result_and_gradient(tuned, X)
        assert (result - expected).norm() <= 2e-2 * expected.norm()
        assert grad.dtype is torch.float32
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(tuned, x, use_reentrant=False).square().mean().backward()
    assert torch.allclose(x.grad, result_and_gradient(tuned, X)[1], rtol=1e-4, atol=1e-6)


def test_quanto_trains_under_autocast_on_inputs_of_either_dtype_where_the_library_multiplies_two():
    for kind in ("quanto int8", "quanto float8", "quanto 4 bits"):
        tuned = tuned_of(KINDS[kind]())
        expected = tuned(X)
        for x in (X, X.bfloat16()):
            with torch.autocast("cpu", torch.bfloat16):
                result, grad = result_and_gradient(tuned, x)
            assert (result - expected).norm() <= 3e-2 * expected.norm()
            assert grad.isfinite().all()
            assert grad.dtype is x.dtype


@pytest.mark.parametrize("kind", [*ONE_OF_EACH, "compressed-tensors W4A16, asymmetric", "quanto 4 bits"])
def test_merged_weights_are_quantised_again_as_they_were_and_the_cost_is_told(kind: str):
    model = KINDS[kind]()
    tuned = tuned_of(model)
    again, costs = lora_fx.merged_and_requantised(tuned, "same")
    exact = lora_fx.merge(tuned)
    for path, cost in zip(PATHS, costs, strict=True):
        layer, before = again.get_submodule(path), model.get_submodule(path)
        assert isinstance(layer, type(before))
        assert layer._parameters.keys() == before._parameters.keys()
        assert not [name for name, _ in layer.named_parameters() if "lora" in name]
        lost = (numbers(layer).float() - exact.get_submodule(path).weight).abs().max()
        assert 0 < float(lost) == pytest.approx(cost.largest, rel=1e-4)
    assert 0 < (again(X) - exact(X)).norm() < 0.3 * exact(X).norm()


_SLOW = [pytest.param(preset, marks=pytest.mark.slow) for preset in ("NVFP4A16", "MXFP4", "MXFP8A16")]


@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4A16", *_SLOW])
def test_floats_of_few_bits_train_as_the_decompressed_model_and_stay_what_they_are(preset: str):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    weights, inputs = (PRESET_SCHEMES[preset].get(part) for part in ("weights", "input_activations"))
    compress_(model := plain().bfloat16(), weights, inputs)
    compressors.ModelCompressor().compress_model(model)
    x, held = X.bfloat16(), {name: p.data_ptr() for name, p in model.named_parameters()}
    tuned, dense = lora_fx.apply(model, rules(), (x,)), copied(model)
    assert torch.equal(tuned(x), dense(x)), "the library's bits, with what it rounds of inputs"
    for path in PATHS:  # it lets no gradient through where it rounds inputs: compared without
        tuned.get_submodule(path).quantization_enabled = dense.get_submodule(path).quantization_enabled = False
    beside = lora_fx.apply(dense, rules(), (x,))
    lora_fx.load_adapter_state(beside, lora_fx.adapter_state(tuned))
    losses: list[list[float]] = [[], []]
    for one, found in zip((tuned, beside), losses, strict=True):
        optimizer = torch.optim.SGD(lora_fx.parameters(one.train()), 0.5)
        for _ in range(4):
            optimizer.zero_grad()
            (loss := one(x).float().square().mean()).backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    merged, exact = lora_fx.merge(tuned.eval()), lora_fx.merge(beside.eval())
    assert all(torch.equal(merged.get_submodule(path).weight, exact.get_submodule(path).weight) for path in PATHS)
    assert merged.get_submodule(PATHS[0]).weight.dtype is torch.bfloat16
    again, costs = lora_fx.merged_and_requantised(tuned, "same")
    assert torch.equal(copied(again)(x), again(x)), "the library reads them"
    assert len(costs) == len(PATHS)
    with pytest.raises(RefusedError, match="whose codes are not written one by one"):
        lora_fx.merged_on_grid(tuned, [(x,), (x,)])
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == held


def test_what_asks_for_numbers_gets_those_that_the_codes_stand_for_and_bfloat16_stays():
    for kind in ONE_OF_EACH:
        tuned = tuned_of(KINDS[kind](), dora=True)
        merged = lora_fx.merge(tuned)
        assert (merged(X) - tuned(X)).norm() <= (3e-2 if "W8A8" in kind else 1e-5) * merged(X).norm()
        result_and_gradient(tuned, X)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_fx.parameters(tuned))
    model = plain().bfloat16()
    compress_(model, INT4)
    from compressed_tensors.compressors import ModelCompressor

    ModelCompressor().compress_model(model)
    tuned, kept = lora_fx.apply(model, rules(), (X.bfloat16(),)), []
    x = X.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = tuned(x)
    assert result.dtype is torch.bfloat16
    wide = [t for t in kept if t.dtype is torch.float32 and not isinstance(t, nn.Parameter)]
    products = [t for t in wide if t.numel() >= x.numel()]
    assert not products, "no copy of x in float32"
    assert not [t for t in kept if type(t) is Tensor and t.shape in ((128, 64), (64, 128))], "no weight is kept"
    result.float().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", [INT4_KIND, "hqq 4 bits", "quanto float8"])
def test_losses_are_those_of_peft_on_the_same_base(kind: str):
    peft = pytest.importorskip("peft")
    model = KINDS[kind]()
    tuned = tuned_of(model, alpha=8)
    base = copied(model) if "compressed" in kind else KINDS[kind]()
    other = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"]))
    ours, theirs = losses_of_both(tuned, other, PATHS, X)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_models_that_compressed_tensors_has_decompressed_are_plain_ones():
    model = copied(KINDS[INT4_KIND]())
    tuned = tuned_of(model)
    wanted = dense_twin_of_plain(tuned)
    assert (tuned(X) - wanted(X)).norm() <= 1e-5 * wanted(X).norm()
    assert {site.backend for site in lora_fx.inspect(tuned).sites} == {"graph"}
    merged = lora_fx.merge(tuned)
    assert (merged(X) - wanted(X)).norm() <= 1e-5 * wanted(X).norm()
    rounding = copied(KINDS["compressed-tensors W8A8"]())
    expected = rounding(X)
    tuned = lora_fx.apply(rounding, rules(), (X,))
    assert torch.equal(tuned(X), expected)
    assert result_and_gradient(tuned, X)[1].norm() > 0.5 * result_and_gradient(plain(), X)[1].norm(), (
        "straight through, where theirs pass by"
    )


def dense_twin_of_plain(tuned: nn.Module) -> nn.Module:
    model = plain()
    for path in PATHS:
        layer, own = tuned.get_submodule(path), model.get_submodule(path)
        A, B = layer.lora_A.default, layer.lora_B.default.weight
        own.weight.data = (layer._parameters["weight"] + A.spec.scaling * (B @ A.weight)).detach()
    return model


UP = {"match": {"name": "**.up"}, "lora": {"r": 4}}


class Aside(nn.Module):
    """A model that holds a layer in a list too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.aside = model, [model.get_submodule("0.up")]

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + self.aside[0](x).sum()


def coded_by(library: str, name: str) -> nn.Module:
    """Return a layer as a library has it, by name, shapes and buffers: gptqmodel does not build here, awq has no CPU."""
    layer = type(name, (nn.Module,), {"__module__": library})()
    layer.in_features, layer.out_features = 64, 128
    layer.register_buffer("qweight", torch.zeros(8, 128, dtype=torch.int32))
    return layer


OF_OTHERS = {
    "TorchQuantLinear of gptqmodel": ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear"),
    "AwqTorchQuantLinear of gptqmodel": ("gptqmodel.nn_modules.qlinear.torch_awq", "AwqTorchQuantLinear"),
    "WQLinear_GEMM of awq": ("awq.modules.linear.gemm", "WQLinear_GEMM"),
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_layers_of_gptq_and_awq_are_refused_by_name_before_anything_changes(name: str, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = plain()
    model[0].up = coded_by(*OF_OTHERS[name])
    one = {"version": 1, "rules": [{"match": {"name": "0.up"}, "lora": {"r": 4}}]}
    lora_fx.save(tuned_of(plain()), tmp_path / "adapter")
    tuned = lora_fx.apply(model, {"version": 1, "rules": [{"match": {"name": "1.up"}, "lora": {"r": 4}}]})
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=4, target_modules=["up", "down"]))
    theirs.base_model.model[0].up.base_layer = model[0].up
    models = (model, tuned, theirs)
    before = [(list(one.state_dict()), [type(module) for module in one.modules()]) for one in models]
    calls = {
        "apply": lambda: lora_fx.apply(model, one),
        "load": lambda: lora_fx.load(model, tmp_path / "adapter"),
        "add": lambda: lora_fx.add(tuned, one, adapter="b"),
        "add a file": lambda: lora_fx.add(tuned, tmp_path / "adapter", adapter="b"),
        "from_peft": lambda: lora_fx.from_peft(theirs),
    }
    for call in calls.values():
        with pytest.raises(RefusedError, match=rf"0\.up +an? {name}: .* has not been run; dequantise the model"):
            call()
    assert f"{name}: what its kernels do with the codes" in str(lora_fx.plan(model, one))
    assert [(list(one.state_dict()), [type(module) for module in one.modules()]) for one in models] == before


def cases() -> list[tuple[nn.Module, str]]:
    """Return models and what is said of their layer `0.up`."""
    not_yet, scaled = plain(), hqq(4)()
    compress_(not_yet, INT4)
    scaled.get_submodule("0.up").meta["quant_scale"] = True
    replaced = KINDS[INT4_KIND]()
    replaced.get_submodule("0.up").forward = lambda x: x
    unread = KINDS["compressed-tensors W4A16, asymmetric"]()
    unfrozen, rounded = KINDS["quanto int8"](), KINDS["quanto int8"]()
    unfrozen[0].up.weight = nn.Parameter(plain()[0].up.weight)
    rounded[0].up.activation_qtype = rounded[0].up.weight_qtype
    layer = unread.get_submodule("0.up")
    layer.weight_zero_point = nn.Parameter(torch.zeros(layer.weight_scale.shape, dtype=torch.int8), requires_grad=False)
    return [
        (unfrozen, r"its weight is rounded at each call; optimum.quanto.freeze\(model\) before"),
        (rounded, "inputs and results are rounded too"),
        (unread, "zeros are not packed as its codes are"),
        (not_yet, "rounded at each call"),
        (scaled, "scales are codes too"),
        (replaced, "something else than compressed-tensors has replaced its forward"),
    ]


def test_what_is_not_known_to_train_is_refused_by_name():
    for model, reason in cases():
        with pytest.raises(lora_fx.RefusedError, match=reason):
            lora_fx.apply(model, {"version": 1, "rules": [{"match": {"name": "0.up"}, "lora": {"r": 4}}]})
    for kind in ("hqq 4 bits", "quanto int8", "compressed-tensors FP8"):
        with pytest.raises(lora_fx.RefusedError, match=r"0\.down\.[A-Za-z_]+ +holds codes"):
            lora_fx.apply(KINDS[kind](), {**rules(), "rules": [UP], "train": ["0.down"]}, (X,))


def test_quanto_says_that_shards_are_not_its_codes_and_who_holds_a_layer_aside_computes_with_the_merged_one():
    model = KINDS["quanto int8"]()
    aside = Aside(model)
    tuned = lora_fx.apply(aside, {"version": 1, "rules": [UP]}, (X,))
    randomise_(tuned)
    merged = lora_fx.merge(tuned)
    assert type(merged.model[0].up) is nn.Linear
    assert (merged(X) - tuned(X)).norm() <= 1e-5 * tuned(X).norm()
    layer = tuned.model[0].up
    layer._parameters["weight"] = nn.Parameter(torch.zeros(128, 64), requires_grad=False)  # what FSDP2 gathers
    with pytest.raises(RefusedError, match=r"QLinear +fully_shard has made plain numbers of its codes"):
        layer(X)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, while it traces the libraries
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_copies_of_files_compiled_code_and_graph_modules_compute_the_same_and_peft_has_it_or_it_is_refused(kind: str):
    tuned = tuned_of(KINDS[kind]())
    expected = tuned(X)
    assert torch.equal(pickle.loads(pickle.dumps(tuned))(X), expected)
    others = [torch.compile(tuned, backend="eager")]
    if "compressed" in kind:  # torch.fx cannot trace how the others unpack
        others.append(lora_fx.apply(torch.fx.symbolic_trace(KINDS[kind]()), rules()))
        lora_fx.load_adapter_state(others[-1], lora_fx.adapter_state(tuned))
    if kind == INT4_KIND:
        with pytest.raises(lora_fx.RefusedError, match="holds codes and no weight"):
            lora_fx.to_peft(tuned)
    else:
        others.append(lora_fx.to_peft(tuned))
    assert all((other(X) - expected).norm() <= 1e-6 * expected.norm() for other in others)
