"""Linears of quantisation libraries: the base stays codes, the adapter is exact beside it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.besidepeft import losses_of_both
from tests.support.packedkinds import KINDS, bnb, eight_bit, four_bit, loaded, model_of, numbers
from tests.support.sitekinds import randomise_, result_and_gradient

X = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
PATHS = [f"{block}.{name}" for block in (0, 1) for name in ("up", "down")]


def tuned_of(model: nn.Module, *, with_values: bool = True, **rule: Any) -> nn.Module:
    tuned = lora_fx.apply(model, rules(**rule), (X,))
    if with_values:
        randomise_(tuned)
    return tuned


def rules(**rule: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": ["**.up", "**.down"]}, "lora": {"r": 4, **rule}}]}


def dense_twin(tuned: nn.Module) -> nn.Module:
    """Return the same blocks with plain linears on W + scaling · B A of dequantised W."""
    model = nn.Sequential(*(copy.deepcopy(block) for block in model_of("NF4")))
    for path in PATHS:
        layer = tuned.get_submodule(path)
        A, B = layer.lora_A.default, layer.lora_B.default.weight
        weight = numbers(layer).float() + A.spec.scaling * (B @ A.weight)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight = nn.Parameter(weight.detach())
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach())
        model.set_submodule(path, plain)
    for block in (0, 1):
        model.get_submodule(f"{block}.norm").load_state_dict(tuned.get_submodule(f"{block}.norm").state_dict())
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_exact_beside_codes_which_stay_where_they_are(kind: str):
    model = model_of(kind)
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    expected = model(X)
    tuned = tuned_of(model, with_values=False)
    assert torch.equal(tuned(X), expected), "B = 0"
    report = lora_fx.inspect(tuned)
    assert {site.backend for site in report.sites} == {"graph"}
    ends = sum(layer.bias.numel() for layer in map(model.get_submodule, PATHS) if layer.bias is not None)
    assert report.total == 4 * 64 * 128 + 4 * 64 + ends + 4 * 4 * (64 + 128), "of codes what they stand for"
    for path in PATHS:
        held, own = model.get_submodule(path)._parameters["weight"], tuned.get_submodule(path)._parameters["weight"]
        assert type(held) is type(own)
        assert held.data_ptr() == own.data_ptr(), "no code is copied"
    randomise_(tuned)
    twin, tolerance = dense_twin(tuned), 2e-2 if "int8" in kind else 1e-5  # int8 rounds its inputs as well
    (result, grad), (wanted, wanted_grad) = result_and_gradient(tuned, X), result_and_gradient(twin, X)
    assert (result - wanted).norm() <= tolerance * wanted.norm()
    assert (grad - wanted_grad).norm() <= tolerance * wanted_grad.norm(), "gradients pass through the base"
    merged = lora_fx.merge(tuned)
    assert {type(merged.get_submodule(path)) for path in PATHS} == {nn.Linear}
    assert (merged(X) - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(lora_fx.remove(tuned)(X), expected)
    assert torch.equal(model(X), expected), "the model that was given goes on as before"
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_modules_give_the_bits_of_graphs_in_both_modes_and_with_dropout():
    model = model_of("NF4")
    tuned = tuned_of(model, dropout=0.5)
    in_modules = lora_fx.apply(model, rules(dropout=0.5), (X,), backend="modules")
    in_modules.load_state_dict(tuned.state_dict(), strict=False)  # bitsandbytes does not read its own scales back
    for training in (True, False):
        results = []
        for one in (tuned, in_modules):
            torch.manual_seed(3)
            results.append(result_and_gradient(one.train(training), X))
        assert all(map(torch.equal, *results))


def test_an_evaluation_between_two_steps_takes_no_gradient_away():
    """bitsandbytes packs codes anew for a kernel of AVX-512 that has no gradient; a layer that is adapted does not."""
    tuned = tuned_of(model_of("NF4"))
    before = result_and_gradient(tuned, X)[1]
    with torch.no_grad():
        tuned.eval()(X)
    assert torch.equal(result_and_gradient(tuned.train(), X)[1], before)


@pytest.mark.parametrize("rule", [{"dora": True}, {"init": "pissa"}, {"bias": True}], ids=str)
def test_what_asks_for_numbers_gets_those_that_the_codes_stand_for(rule: dict[str, Any]):
    model = model_of("NF4 with double quantisation")
    tuned = tuned_of(model, with_values=False, **rule)
    assert torch.allclose(tuned(X), model(X), atol=1e-5)
    if "dora" in rule:
        layer = tuned.get_submodule("0.up")
        assert torch.allclose(layer.lora_magnitude_vector.default.weight, numbers(layer).norm(dim=1))
    randomise_(tuned)
    assert (lora_fx.merge(tuned)(X) - tuned(X)).norm() <= 1e-5 * tuned(X).norm()
    result_and_gradient(tuned, X)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_fx.parameters(tuned))


def test_bfloat16_inputs_are_kept_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(four_bit("nf4", dtype=torch.bfloat16)(64, 64))
    tuned = lora_fx.apply(model, {"version": 1, "rules": [{"match": {"name": "0"}, "lora": {"r": 4}}]})
    randomise_(tuned)
    x, kept = X.bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = tuned(x)
    assert result.dtype is torch.bfloat16
    assert not [t for t in kept if t.dtype is torch.float32 and t.numel() >= x.numel()], "no copy of x in float32"
    result.float().sum().backward()
    assert x.grad is not None
    merged = lora_fx.merge(tuned)
    assert merged[0].weight.dtype is torch.bfloat16
    assert (merged(x) - result).float().norm() <= 2e-2 * result.float().norm()


def test_merged_layers_of_another_dtype_than_the_model_are_told():
    tuned = tuned_of(model_of("NF4")).to(torch.bfloat16)  # what the codes stand for stays float32
    with pytest.warns(lora_fx.LoraFxWarning, match=r"merged layers are float32, .*`\.to\(torch\.bfloat16\)`"):
        merged = lora_fx.merge(tuned).to(torch.bfloat16)
    expected = tuned(X.bfloat16()).float()
    assert (merged(X.bfloat16()).float() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("kind", ["NF4", "int8"])
def test_an_adapter_is_extracted_from_what_codes_stand_for(kind: str):
    model = model_of(kind)
    tuned = tuned_of(model)
    extracted = lora_fx.extract(lora_fx.merge(tuned), model, r=4)
    assert (extracted(X) - tuned(X)).norm() <= 1e-4 * tuned(X).norm()


def test_copies_pickles_files_and_autocast():
    model = model_of("int8")
    tuned = tuned_of(model)
    expected = tuned(X)
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(tuned), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tuned(X) - expected).norm() <= 2e-2 * expected.norm()
    checkpointed = torch.utils.checkpoint.checkpoint(tuned, X.clone().requires_grad_(), use_reentrant=False)
    assert (checkpointed - expected).norm() <= 1e-3 * expected.norm(), "int8 rounds its inputs, whatever made them"


def test_adapter_goes_to_a_file_and_back(tmp_path: Path):
    model = model_of("NF4")
    tuned = tuned_of(model)
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(lora_fx.load(model, tmp_path)(X), tuned(X))
    assert torch.equal(lora_fx.load(model, tmp_path, example_inputs=(X,))(X), tuned(X))


@pytest.mark.parametrize("kind", ["NF4 with double quantisation", "int8"])
def test_merged_weights_are_quantised_again_as_they_were_and_the_cost_is_told(kind: str):
    tuned = tuned_of(model_of(kind))
    with pytest.warns(lora_fx.LoraFxWarning, match="quantising 4 merged weights again has changed them"):
        again = lora_fx.merge(tuned, requantize="same")
    exact, costs = lora_fx.merge(tuned), lora_fx.merged_and_requantised(tuned, "same")[1]
    for path, cost in zip(PATHS, costs, strict=True):
        layer, before = again.get_submodule(path), tuned.get_submodule(path)
        assert cost.path == path
        assert type(layer) is type(model_of(kind).get_submodule(path))
        assert not [name for name, _ in layer.named_parameters() if "lora" in name]
        lost = (numbers(layer).float() - exact.get_submodule(path).weight).abs().max()
        assert 0 < float(lost) == pytest.approx(cost.largest, rel=1e-4)
        if kind != "int8":
            state, old = layer.weight.quant_state, before._parameters["weight"].quant_state
            settings = [(one.quant_type, one.blocksize, one.nested, one.dtype) for one in (state, old)]
            assert settings[0] == settings[1]
    share = (again(X) - exact(X)).norm() / exact(X).norm()
    assert 0 < share < 0.3
    with pytest.raises(lora_fx.LoraFxError, match="no codes that can be chosen"):
        lora_fx.merged_on_grid(tuned, [(X,), (X,)])


class Unquantised:
    """Layers that hold no codes, or codes through which nothing can be trained, and what is said of each."""

    @staticmethod
    def cases() -> dict[str, tuple[nn.Module, str]]:
        packed = four_bit("nf4")(64, 64)
        packed._parameters["weight"].quant_state.packing_format_for_cpu = True
        return {
            "4 bits": (bnb.nn.Linear4bit(64, 64), "not quantised yet; move it to the device"),
            "8 bits": (bnb.nn.Linear8bitLt(64, 64), "has_fp16_weights"),
            "packed": (packed, "repacked its weight for inference, through which no gradient passes"),
            "meta": (bnb.nn.Linear4bit(64, 64, device="meta"), "on the meta device"),
        }


def test_layers_without_codes_and_those_packed_for_inference_are_refused_by_name():
    for layer, reason in Unquantised.cases().values():
        with pytest.raises(lora_fx.RefusedError, match=reason):
            lora_fx.apply(nn.Sequential(layer), {"version": 1, "rules": [{"match": {"name": "0"}}]})


def test_a_subclass_with_a_forward_of_its_own_is_refused_and_codes_are_not_trained_whole():
    class Other(bnb.nn.Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    other = loaded(Other(64, 64, bias=False), torch.float32)
    with pytest.raises(lora_fx.RefusedError, match="class Other has a forward of its own"):
        lora_fx.apply(nn.Sequential(other), {"version": 1, "rules": [{"match": {"name": "0"}}]})
    with pytest.raises(lora_fx.RefusedError, match=r"0\.up\.weight +holds codes, not numbers"):
        lora_fx.apply(model_of("NF4"), {**rules(), "train": ["0.up"]}, (X,))


def test_losses_and_factors_are_those_of_peft_on_the_same_base():
    peft = pytest.importorskip("peft")
    model = model_of("NF4")
    tuned = tuned_of(model, alpha=8)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
    other = peft.get_peft_model(copy.deepcopy(model), config)
    ours, theirs = losses_of_both(tuned, other, PATHS, X)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_graph_module_that_calls_the_layers_is_adapted_and_merged():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, bnb.nn.Linear4bit) or super().is_leaf_module(module, name)

    model = model_of("NF4")
    graph_module = torch.fx.GraphModule(model, Tracer().trace(model))
    tuned = tuned_of(graph_module)
    expected = dense_twin(tuned)(X)
    assert (tuned(X) - expected).norm() <= 1e-5 * expected.norm()
    merged = lora_fx.merge(tuned)
    assert (merged(X) - expected).norm() <= 1e-5 * expected.norm()
    assert type(merged.get_submodule("0.up")) is nn.Linear
    with pytest.raises(lora_fx.RefusedError, match="reads codes here"):
        tuned_of(graph_module, dora=True)


def test_what_is_exported_merged_is_plain_everywhere(tmp_path: Path):
    model = nn.Sequential(*model_of("int8 without a bias"), eight_bit()(64, 64))
    tuned = tuned_of(model)
    lora_fx.export(tuned, tmp_path / "merged.safetensors", "merged")
    written = lora_fx.merge(tuned).state_dict()
    from safetensors.torch import load_file

    held = load_file(tmp_path / "merged.safetensors")
    assert {value.dtype for value in held.values()} == {torch.float32}, "the dtype of the model, which int8 has lost"
    assert torch.equal(held["0.up.weight"], written["0.up.weight"])
    assert torch.allclose(held["2.weight"], numbers(model[2]).float())
