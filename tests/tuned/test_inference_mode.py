"""What is made in `torch.inference_mode()`, or of a model that was, can be trained like any other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.models.modes import normal
from tests.support.zoo import randomise_

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
RULES = {"rules": [{"match": {"name": ["0", "2"]}, "lora": {"r": 2, "alpha": 6}}]}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return model()


def adapted() -> nn.Module:
    tuned = lora_fx.apply(model(), RULES, (X,))
    randomise_(tuned)
    return tuned


def trained(tuned: nn.Module) -> list[Tensor]:
    """Return the gradients of all parameters after one step of training; a layer of torch's own runs first."""
    for parameter in tuned.parameters():
        parameter.requires_grad_(True)
    tuned.train()
    tuned(X).square().sum().backward()
    return [parameter.grad for parameter in tuned.parameters() if parameter.grad is not None]


def graphs_of(tuned: nn.Module) -> list[tuple[str, int, tuple[str, ...]]]:
    return [(region.path, region.graphs, region.failures) for region in lora_fx.inspect(tuned).regions]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    lora_fx.save(adapted(), folder)
    return folder


def with_second(tuned: nn.Module, source: object) -> nn.Module:
    lora_fx.add(tuned, source, adapter="b")
    lora_fx.use(tuned, "b")
    return tuned


def combined(tuned: nn.Module) -> nn.Module:
    lora_fx.combine(tuned, {"default": 0.5}, adapter="b", method="cat")
    lora_fx.use(tuned, "b")
    return tuned


def swapped(tuned: nn.Module, folder: Path) -> nn.Module:
    lora_fx.swap(tuned, folder, adapter="default")
    return tuned


def from_peft() -> nn.Module:
    peft = pytest.importorskip("peft")
    return lora_fx.from_peft(peft.get_peft_model(model(), peft.LoraConfig(target_modules=["0", "2"])))


def to_peft(tuned: nn.Module) -> nn.Module:
    pytest.importorskip("peft")
    return lora_fx.to_peft(tuned)


MAKERS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "apply": lambda tuned, _: lora_fx.apply(model(), RULES, (X,)),
    "apply with modules": lambda tuned, _: lora_fx.apply(model(), RULES, backend="modules"),
    "apply to a graph": lambda tuned, _: lora_fx.apply(fx.symbolic_trace(model()), RULES),
    "pissa": lambda tuned, _: lora_fx.apply(
        model(), {"rules": [{"match": {"name": "0"}, "lora": {"r": 2, "init": "pissa"}}]}, (X,)
    ),
    "load": lambda tuned, folder: lora_fx.load(model(), folder, (X,)),
    "add rules": lambda tuned, _: with_second(tuned, RULES),
    "add a directory": with_second,
    "add a model": lambda tuned, _: with_second(tuned, adapted()),
    "combine": lambda tuned, _: combined(tuned),
    "swap": swapped,
    "extract": lambda tuned, _: lora_fx.extract(lora_fx.merge(tuned), model(), 2),
    "from_peft": lambda tuned, _: from_peft(),
    "to_peft": lambda tuned, _: to_peft(tuned),
    "merge": lambda tuned, _: lora_fx.merge(tuned),
    "remove": lambda tuned, _: lora_fx.remove(tuned),
    "remerge": lambda tuned, _: lora_fx.remerge(tuned),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_made_in_inference_mode_trains_like_what_is_made_outside(name, saved):
    results = []
    for inside in (False, True):
        tuned = adapted()
        torch.manual_seed(1)
        with torch.inference_mode(inside):
            made = MAKERS[name](tuned, saved)
            assert torch.is_inference_mode_enabled() is inside, "the caller's mode is as it was"
        results.append(trained(made))
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))
    assert any(bool(gradient.any()) for gradient in results[0])


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("backend", ["auto", "modules"])
def test_model_that_was_made_in_inference_mode_is_adapted_on_its_own_memory(backend, inside):
    base = made_in_inference_mode()
    with warnings.catch_warnings(), torch.inference_mode(inside):
        warnings.simplefilter("error")
        tuned = lora_fx.apply(base, RULES, (X,), backend)
    assert not any(parameter.is_inference() for parameter in tuned.parameters())
    assert lora_fx.remove(tuned)[0].weight.data_ptr() == base[0].weight.data_ptr()
    assert base[0].weight.is_inference()
    plain = lora_fx.apply(model(), RULES, (X,), backend)
    for one in (tuned, plain):
        randomise_(one)
    assert graphs_of(tuned) == graphs_of(plain), "as many run as graphs"
    assert all(map(torch.equal, trained(tuned), trained(plain)))


def test_torch_alone_refuses_to_train_on_weights_made_in_inference_mode():
    inputs = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        made_in_inference_mode()(inputs)


def test_example_inputs_made_in_inference_mode_prove_gradients_too():
    with torch.inference_mode():
        inputs = X * 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned = lora_fx.apply(model(), RULES, (inputs,))
    randomise_(tuned)
    plain = adapted()
    assert graphs_of(tuned) == graphs_of(plain)
    assert all(map(torch.equal, trained(tuned), trained(plain)))


def test_tied_weights_made_in_inference_mode_stay_tied():
    with torch.inference_mode():
        base = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
        base["b"].weight = base["a"].weight
    tuned = lora_fx.apply(base, {"rules": [{"match": {"name": "c"}, "lora": {"r": 2}}]}, backend="modules")
    assert tuned["a"].weight is tuned["b"].weight
    assert lora_fx.remove(tuned)["c"].weight.data_ptr() == base["c"].weight.data_ptr()


@pytest.mark.parametrize("weight", [torch.randn(4, 6), torch.randn(6, 4).t(), torch.randn(5, 8)[1:, ::2]])
def test_alias_of_what_was_made_in_inference_mode_lies_where_it_lies(weight):
    with torch.inference_mode():
        sealed = weight.clone(memory_format=torch.preserve_format).t()
    alias = normal(sealed)
    assert torch.equal(alias, sealed)
    assert (alias.data_ptr(), alias.stride(), alias.is_inference()) == (sealed.data_ptr(), sealed.stride(), False)
    assert normal(weight) is weight


def test_weights_of_torchao_made_in_inference_mode_are_used_as_they_are():
    torchao = pytest.importorskip("torchao.quantization")
    with torch.inference_mode():
        base = nn.Sequential(nn.Linear(32, 32))
        torchao.quantize_(base, torchao.Int8WeightOnlyConfig())
        rows = torch.randn(3, 32)
        tuned = lora_fx.apply(base, {"rules": [{"match": {"name": "0"}, "lora": {"r": 2}}]}, (rows,))
        assert torch.equal(tuned(rows), base(rows))
