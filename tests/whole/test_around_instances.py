"""What stands on an instance (a replaced forward, accelerate's hooks) works on the twin, or is refused by name."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from tests.support.around import assert_close, filled

RULES = {"version": 1, "rules": [{"match": {"name": "**", "op": "linear"}, "lora": {"r": 2, "alpha": 4}}]}
PLACES = {"leaf": "blocks.0.first", "block": "blocks.0", "root": ""}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def given() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def by_closure(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs)


def by_partial(module: nn.Module) -> None:
    module.forward = functools.partial(type(module).forward, module)


def by_method(module: nn.Module) -> None:
    own = type(module).forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: own(self, *args, **kwargs), module)


class Wrapper:
    """A callable object that holds the forward it stands for."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.inner = forward

    def __call__(self, *args: Any) -> Any:
        return self.inner(*args)


def by_object(module: nn.Module) -> None:
    module.forward = Wrapper(module.forward)


def twice_by_closures(module: nn.Module) -> None:
    by_closure(module)
    by_closure(module)


def by_accelerate(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def by_two_hooks(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"), append=True)


def by_prepare(module: nn.Module) -> None:
    """As `Accelerator.prepare` does in bfloat16, but for the autocast, which would round."""
    operations = pytest.importorskip("accelerate.utils.operations")
    module._original_forward = module.forward
    module.forward = types.MethodType(operations.convert_outputs_to_fp32(module.forward.__func__), module)


WAYS = (by_closure, by_partial, by_method, by_object, twice_by_closures, by_accelerate, by_two_hooks, by_prepare)


def gradients(tuned: nn.Module) -> dict[str, Tensor]:
    tuned.zero_grad()
    tuned(given()).square().sum().backward()
    named = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in named.values()), "an adapter without a gradient"
    return named


@functools.cache
def undisturbed() -> nn.Module:
    return filled(lora_fx.apply(model(), RULES, backend="modules"))


@functools.cache
def disturbed(way: Callable[[nn.Module], None], place: str, when: str, with_inputs: bool = True) -> nn.Module:
    base = model()
    if when == "before":
        way(base.get_submodule(place))
    tuned = filled(lora_fx.apply(base, RULES, (given(),) if with_inputs else None))
    if when == "after":
        way(tuned.get_submodule(place))
    return tuned


every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
everywhere = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
before_and_after = pytest.mark.parametrize("when", ["before", "after"])


@every_way
@everywhere
@before_and_after
@pytest.mark.sampled(2)
def test_adapters_act_and_are_trained_as_without_it(way, place, when):
    tuned, plain = disturbed(way, place, when), undisturbed()
    assert_close(tuned(given()), plain(given()))
    expected = gradients(plain)
    actual = gradients(tuned)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


@every_way
@everywhere
@before_and_after
@pytest.mark.sampled(2)
def test_merged_removed_copied_and_disabled_models_are_those_without_it(way, place, when, tmp_path):
    tuned, plain, x = disturbed(way, place, when), undisturbed(), given()
    assert_close(lora_fx.merge(tuned)(x), lora_fx.merge(plain)(x))
    assert torch.equal(lora_fx.remove(tuned)(x), model()(x))
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(x), model()(x))
    lora_fx.save(tuned, tmp_path)
    assert_close(lora_fx.load(model(), tmp_path)(x), plain(x))
    if "closure" not in way.__name__ and way not in (by_object,):  # a copy of those calls the original, in any model
        assert_close(copy.deepcopy(tuned)(x), plain(x))


@every_way
@everywhere
@pytest.mark.sampled(2)
def test_merged_model_is_its_own(way, place):
    tuned = disturbed.__wrapped__(way, place, "before")  # one to spoil
    merged, expected = lora_fx.merge(tuned), undisturbed()(given())
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.zero_()
    assert_close(merged(given()), expected)


@every_way
@everywhere
@pytest.mark.sampled(2)
def test_twin_leaves_the_model_alone(way, place):
    base = model()
    way(base.get_submodule(place))
    tuned = filled(lora_fx.apply(base, RULES, (given(),)))
    tuned(given()).sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert torch.equal(base(given()), model()(given()))


@everywhere
@before_and_after
def test_forward_that_multiplies_by_the_weight_itself_gets_the_adapted_one(place, when):
    """Liger style: the layer's own forward is not called at all."""

    def by_reading(module: nn.Module) -> None:
        for inner in (m for m in module.modules() if isinstance(m, nn.Linear)):
            inner.forward = types.MethodType(lambda self, x: F.linear(x, self.weight, self.bias), inner)

    tuned, plain = disturbed(by_reading, place, when), undisturbed()
    assert_close(tuned(given()), plain(given()))
    assert_close(lora_fx.merge(tuned)(given()), plain(given()))
    for (name, actual), expected in zip(gradients(tuned).items(), gradients(plain).values(), strict=True):
        assert_close(actual, expected, msg=name)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights_are_adapted_merged_and_saved(kind, when, tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def offload(whole: nn.Module) -> None:
        if kind == "cpu":
            accelerate.cpu_offload(whole, execution_device="cpu")
        else:
            accelerate.disk_offload(whole, str(tmp_path / "weights"), execution_device="cpu")

    base = model()
    if when == "before":
        offload(base)
    tuned = filled(lora_fx.apply(base, RULES, (given(),)))
    if when == "after":
        offload(tuned)
    plain = undisturbed()
    assert_close(tuned(given()), plain(given()))
    if when == "before":  # after, the factors are offloaded too: values that cannot be trained
        for (name, actual), expected in zip(gradients(tuned).items(), gradients(plain).values(), strict=True):
            assert_close(actual, expected, msg=name)
    assert_close(lora_fx.merge(tuned)(given()), plain(given()))
    assert_close(lora_fx.remove(tuned)(given()), model()(given()))
    lora_fx.save(tuned, tmp_path / "adapter")
    assert_close(lora_fx.load(model(), tmp_path / "adapter")(given()), plain(given()))


def test_weights_of_a_model_that_accelerate_dispatches_are_not_copied():
    accelerate = pytest.importorskip("accelerate")
    base = accelerate.cpu_offload(model(), execution_device="cpu")
    tuned = lora_fx.apply(base, RULES, (given(),))
    hooks = [whole.blocks[0].first._hf_hook for whole in (base, tuned)]
    one, other = (getattr(hook, "hooks", [hook])[0].weights_map for hook in hooks)
    assert one is other


GLOBAL = model()


def test_function_that_reaches_the_model_by_a_global_variable_is_refused():
    base = GLOBAL
    base.blocks[0].forward = lambda x: Block.forward(GLOBAL.blocks[0], x)
    try:
        with pytest.raises(lora_fx.RefusedError, match=r"blocks.0.forward.*\n?.*GLOBAL"):
            lora_fx.apply(base, RULES)
    finally:
        del base.blocks[0].forward


class CutOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x).detach()


def test_apply_says_which_adapters_no_gradient_reaches():
    with pytest.warns(lora_fx.LoraFxWarning, match="no gradient reaches the adapters of b "):
        lora_fx.apply(CutOff(), RULES, (given(),))


class FirstCallCutOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach() + self.a(x + 1)


def test_apply_says_so_of_one_call_whose_adapter_no_gradient_reaches():
    rules = {"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"r": 2}, "per_call": True}]}
    with pytest.warns(lora_fx.LoraFxWarning, match="no gradient reaches the adapters of a "):
        lora_fx.apply(FirstCallCutOff(), rules, (torch.randn(2, 6),))
