"""`bias: all` and `bias: lora_only`: which biases are trained, and that the base's come back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.files.adapter.contents import contents_of
from tests.support.twoadapters import BACKENDS, Block, given


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model() -> Any:
    torch.manual_seed(0)
    return Model().eval()


def rules(bias: str = "all", **more: Any) -> dict[str, Any]:
    lora = {"r": 2, "init": "random", **more.pop("lora", {})}
    return {"version": 1, "rules": [{"match": {"name": "**.{q,k}"}, "lora": lora}], "bias": bias, **more}


def trained(inputs: Any = None, chosen: Any = None) -> Any:
    torch.manual_seed(1)
    tuned = lora_fx.apply(model(), chosen or rules(), inputs, backend="auto" if inputs else "modules")
    move(tuned)
    return tuned


def move(tuned: Any, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            if parameter.dim() == 1:
                parameter += by


def biases(tuned: nn.Module) -> set[str]:
    wanted = {id(parameter) for parameter in lora_fx.parameters(tuned)}
    return {name for name, p in tuned.named_parameters() if id(p) in wanted and name.endswith("bias")}


ALL = {name for name, _ in model().named_parameters() if name.endswith("bias")}
TRAINED = {"none": set(), "lora_only": {name for name in ALL if ".q." in name or ".k." in name}, "all": ALL}


@pytest.mark.parametrize("which", TRAINED)
def test_biases_are_trained_as_in_peft(which):
    peft = pytest.importorskip("peft")
    tuned = lora_fx.apply(model(), rules(which), backend="modules")
    assert biases(tuned) == TRAINED[which]
    theirs = peft.get_peft_model(model(), peft.LoraConfig(target_modules=["q", "k"], r=2, bias=which))
    names = {name for name, p in theirs.named_parameters() if p.requires_grad and "lora" not in name}
    assert {name.removeprefix("base_model.model.").replace(".base_layer", "") for name in names} == TRAINED[which]
    assert sum(p.numel() for p in lora_fx.parameters(tuned)) == lora_fx.plan(model(), rules(which)).trainable


def test_plan_tells_of_other_layers_biases():
    plan = lora_fx.plan(model(), rules())
    assert "train biases of other layers: 4 vectors, 23 parameters" in str(plan)
    assert lora_fx.Plan.from_json(plan.to_json()) == plan
    tuned = lora_fx.apply(model(), plan)
    assert set(lora_fx.inspect(tuned).trained) == {"blocks.0.out.bias", "blocks.1.out.bias", "norm.bias", "head.bias"}


@BACKENDS
def test_base_comes_back_for_a_while_and_for_good(inputs):
    tuned, base = trained(inputs), model()(given())
    now = tuned(given())
    assert torch.equal(tuned.norm.bias, model().norm.bias + 0.1)
    for without in (lora_fx.disabled(tuned), lora_fx.use(tuned, None)):
        with without:
            assert torch.equal(tuned(given()), base)
            assert torch.equal(tuned.norm.bias, model().norm.bias)
    assert torch.equal(tuned(given()), now)
    assert torch.equal(lora_fx.remove(tuned)(given()), base)
    torch.testing.assert_close(lora_fx.merge(tuned)(given()), now)


def test_callers_biases_stay_and_keys_too():
    caller = model()
    tuned = lora_fx.apply(caller, rules(), backend="modules")
    move(tuned)
    tuned(given()).sum().backward()
    assert all(torch.equal(p, q) for p, q in zip(caller.parameters(), model().parameters(), strict=True))
    assert [name for name in tuned.state_dict() if "lora" not in name] == list(model().state_dict())


def test_an_added_adapter_has_biases_of_its_own():
    tuned = trained()
    expected = tuned(given())
    lora_fx.add(tuned, rules(), adapter="b")
    lora_fx.use(tuned, "b")
    assert torch.equal(tuned.norm.bias, model().norm.bias)
    own = {name for name, p in tuned.named_parameters() if ".b." in name and name.endswith("bias")}
    assert len(own) == len(ALL)
    with torch.no_grad():
        tuned.get_parameter("norm.lora_trained.b.bias").add_(3)
    assert torch.equal(tuned.norm.bias, model().norm.bias + 3)
    lora_fx.use(tuned, "default")
    assert torch.equal(tuned(given()), expected)
    lora_fx.drop(tuned, "b")
    assert torch.equal(tuned(given()), expected)
    lora_fx.add(tuned, rules(), adapter="c")
    with pytest.raises(lora_fx.RefusedError, match=r"norm.bias"):
        lora_fx.drop(tuned, "default")


def test_files_have_every_bias_and_each_adapter_its_own(tmp_path):
    tuned = trained()
    lora_fx.add(tuned, rules(), adapter="b")
    with torch.no_grad():
        tuned.get_parameter("norm.lora_trained.b.bias").add_(3)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(model(), tmp_path)
    for name in ("default", "b", None):
        for each in (tuned, loaded):
            lora_fx.use(each, name)
        assert torch.equal(loaded(given()), tuned(given()))
    lora_fx.save(loaded, tmp_path / "again")
    for file in ("adapter_model.safetensors", "b/adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    assert "biases of other layers" in contents_of(tmp_path).features


def test_module_that_is_trained_whole_keeps_its_bias_there():
    tuned = lora_fx.apply(model(), rules(train=["norm"]), backend="modules")
    assert biases(tuned) == ALL
    assert "norm.bias" not in [bias.path for bias in lora_fx.plan(model(), rules(train=["norm"])).biases]


def test_tied_biases_are_trained_as_one():
    caller = model()
    caller.blocks[1].out.bias = caller.blocks[0].out.bias
    tuned = lora_fx.apply(copy.deepcopy(caller), rules(), backend="modules")
    assert tuned.blocks[1].out.bias is tuned.blocks[0].out.bias
    assert lora_fx.plan(caller, rules()).trainable == sum(p.numel() for p in lora_fx.parameters(tuned))
    removed = lora_fx.remove(tuned)
    assert removed.blocks[1].out.bias is removed.blocks[0].out.bias


def test_rule_that_leaves_a_bias_out_contradicts():
    with pytest.raises(lora_fx.RuleError, match="bias: all contradicts a `bias: false`"):
        lora_fx.plan(model(), rules(lora={"bias": False}))
    tuned = lora_fx.apply(model(), rules("lora_only", lora={"bias": False}), backend="modules")
    assert biases(tuned) == set()


def test_unknown_choice_of_biases_is_an_error():
    with pytest.raises(lora_fx.RuleError, match=r"bias 'lora' is unknown(.|\n)*none, lora_only, all"):
        lora_fx.plan(model(), rules("lora"))


def test_biases_of_modules_that_are_called_like_one_trained_whole_are_read_again(tmp_path):
    base = model()
    base.headnorm = nn.LayerNorm(6)  # its name ends like that of `norm`
    tuned = lora_fx.apply(base, rules(train=["norm"]), backend="modules")
    move(tuned)
    lora_fx.save(tuned, tmp_path)
    again = lora_fx.load(base, tmp_path)
    assert torch.equal(again.headnorm.bias, tuned.headnorm.bias)
    assert biases(again) == biases(tuned)
