"""`per_call: true`: a module that is called several times gets an adapter for each call, as if it were several modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel

import lora_fx
from lora_fx.models.samples import Sample
from tests.support.sitekinds import BACKENDS, RANK, SCALING, factors, randomise_, relative, run, same_values

both = pytest.mark.parametrize("backend", BACKENDS)
CALLS = 3


class Block(nn.Module):
    """One residual block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Repeated(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.block = Block()
        self.checkpointed, self.times = checkpointed, CALLS

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return x


class Untied(nn.Module):
    """The same with a block for each call."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for _ in range(CALLS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def build() -> nn.Module:
    torch.manual_seed(0)
    return Repeated().eval()


def sample(batch: int = 2) -> Sample:
    torch.manual_seed(batch)
    return lora_fx.call(torch.randn(batch, 4, 6))


def rules(names: str = "**.{up,down}", **more: Any) -> dict[str, Any]:
    rule = {"match": {"name": names}, "lora": {"r": RANK, "alpha": RANK * SCALING, **more}, "per_call": True}
    return {"version": 1, "rules": [rule]}


def trained(backend: str = "modules", **more: Any) -> nn.Module:
    tuned = lora_fx.apply(build(), rules(**more), sample(), backend=backend)
    randomise_(tuned)
    return tuned


def untied(tuned: nn.Module) -> tuple[nn.Module, list[Tensor]]:
    """Return a model with a block for each call, and the factors of `tuned` in it as parameters of dense weights."""
    base = build()
    model = Untied(base.block).requires_grad_(False)
    leaves = []
    for call, block in enumerate(model.blocks):
        for layer in ("up", "down"):
            A, B = (
                getattr(tuned.block, layer).get_submodule(f"lora_{factor}.default.{call}").weight for factor in "AB"
            )
            A, B = (factor.detach().clone().requires_grad_() for factor in (A, B))
            leaves += [A, B]
            linear = getattr(block, layer)
            weight = linear.weight
            del linear.weight
            linear.weight = weight + SCALING * B @ A
    return model, leaves


@both
def test_model_starts_bit_equal_to_its_base(backend: str):
    tuned = lora_fx.apply(build(), rules(dropout=0.2), sample(), backend=backend)
    base = build().requires_grad_(False)
    for training in (False, True):
        for batch in (2, 3):
            assert torch.equal(run(tuned, sample(batch), training, grad=True), run(base, sample(batch), training))


def test_there_are_as_many_adapters_as_calls():
    tuned = trained()
    plan = lora_fx.plan(build(), rules(), sample())
    assert [(site.path, site.calls, site.per_call) for site in plan.adapted] == [
        ("block.up", 3, True), ("block.down", 3, True)
    ]  # fmt: skip
    assert len(factors(tuned)) == 2 * 2 * CALLS
    assert plan.trainable == sum(factor.numel() for factor in factors(tuned).values()) == CALLS * 2 * RANK * (6 + 10)


@both
def test_each_adapter_learns_its_own_call(backend: str):
    tuned = trained(backend)
    model, leaves = untied(tuned)
    for batch in (2, 5, 2):  # the count begins anew with every forward
        result, expected = run(tuned, sample(batch), grad=True), run(model, sample(batch), grad=True)
        assert relative(result, expected) <= 1e-5
    weights = torch.arange(result.numel()).cos()
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    (result * weights).sum().backward()
    gradients = [
        getattr(tuned.block, layer).get_submodule(f"lora_{factor}.default.{call}").weight.grad
        for call in range(CALLS)
        for layer in ("up", "down")
        for factor in "AB"
    ]
    for one, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 0
        assert relative(one, other) <= 5e-5


@both
def test_a_forward_that_fails_half_way_leaves_no_wrong_count(backend: str):
    tuned = trained(backend)
    expected = run(tuned, sample())
    with pytest.raises(RuntimeError):
        tuned(torch.randn(2, 4, 7))
    failing = tuned.block.register_forward_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        tuned(*sample().args)
    failing.remove()
    assert torch.equal(run(tuned, sample()), expected)


def _fail(module: nn.Module, args: Any, result: Any) -> None:
    raise ZeroDivisionError


@both
def test_saved_adapters_load_bit_equal(backend: str, tmp_path):
    tuned = trained(backend, dropout=0.2)
    lora_fx.save(tuned, tmp_path)
    for given in (sample(), None):
        loaded = lora_fx.load(build(), tmp_path, given)
        assert same_values(loaded, tuned)
        for training in (False, True):
            assert torch.equal(run(loaded, sample(), training), run(tuned, sample(), training))


def test_bias_that_is_trained_beside_them_is_saved_once_and_loads(tmp_path):
    tuned = trained(bias=True)
    with torch.no_grad():
        tuned.block.up.bias.add_(1)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(build(), tmp_path)
    assert same_values(loaded, tuned)
    assert torch.equal(loaded.block.up.bias, tuned.block.up.bias)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum("bias" in key for key in file.keys()) == 2  # noqa: SIM118


@both
def test_removing_and_disabling_give_the_base_back(backend: str):
    tuned, base = trained(backend), build()
    with lora_fx.disabled(tuned):
        assert torch.equal(run(tuned, sample()), run(base, sample()))
    removed = lora_fx.remove(tuned)
    assert same_values(removed, base)
    assert torch.equal(run(removed, sample()), run(base, sample()))
    assert not removed._forward_pre_hooks


@both
def test_copies_count_for_themselves(backend: str):
    tuned = trained(backend)
    expected = run(tuned, sample())
    twin = copy.deepcopy(tuned)
    assert torch.equal(run(twin, sample()), expected)
    assert torch.equal(run(tuned, sample()), expected)


def test_merging_is_refused_by_name():
    with pytest.raises(lora_fx.MergeError) as caught:
        lora_fx.merge(trained())
    assert "block.up" in str(caught.value)
    assert "block.down" in str(caught.value)
    assert "each call has an adapter of its own" in str(caught.value)


@both
def test_activation_checkpointing_is_refused_loudly(backend: str):
    torch.manual_seed(0)
    model = Repeated(checkpointed=True)
    tuned = lora_fx.apply(model, rules(), sample(), backend=backend).train()
    result = tuned(sample().args[0].requires_grad_())
    with pytest.raises(lora_fx.RefusedError, match="activation checkpointing"):
        result.sum().backward()


def test_more_calls_than_were_planned_are_refused():
    tuned = trained()
    tuned.times = CALLS + 1
    with pytest.raises(lora_fx.LoraFxError):
        tuned(*sample().args)


def test_plan_without_inputs_refuses():
    plan = lora_fx.plan(build(), rules())
    assert [site.decision for site in plan.sites if site.rule] == ["refuse", "refuse"]
    assert "per_call needs example_inputs" in plan.refused[0].reason


def test_weight_that_code_reads_is_refused():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.fc.weight) @ self.fc.weight

    plan = lora_fx.plan(Reads(), rules("fc"), sample())
    assert "code reads this weight" in plan.refused[0].reason


def test_module_that_is_called_once_gets_one_adapter():
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(6, 6)), rules("0"), sample())
    assert [name for name, _ in tuned.named_parameters() if "lora_A" in name] == ["0.lora_A.default.weight"]


# -- an adapter for each row of a batch


def with_one_for_all_calls(backend: str) -> nn.Module:
    """Return a model with "default", of which each call has its own, "again" likewise, and "plain" for all calls."""
    tuned = trained(backend)
    torch.manual_seed(5)
    lora_fx.add(tuned, rules("**.up", init="random"), adapter="again")
    plain = {"match": {"name": "**.{up,down}"}, "lora": {"r": 3, "init": "random"}}
    lora_fx.add(tuned, {"rules": [plain]}, adapter="plain")
    return tuned


@both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "names", [["default", None, "plain", "again"], ["again"] * 4, ["plain", "default", "plain", "default"], [None] * 4]
)
@pytest.mark.sampled(2)
def test_each_row_has_the_calls_of_its_own_adapter(names: list[str | None], training: bool, backend: str):
    tuned, (x,) = with_one_for_all_calls(backend).train(training), sample(4).args
    results = []
    for _ in range(2):  # calls are counted anew in each forward
        with lora_fx.rows(tuned, names):
            results.append(tuned(x))
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            alone = tuned(x[number : number + 1])
        for together in results:
            torch.testing.assert_close(together[number : number + 1], alone, atol=1e-5, rtol=1e-5)


def test_gradients_of_rows_reach_the_factors_of_each_call():
    tuned, (x,) = with_one_for_all_calls("modules"), sample(2).args
    with lora_fx.rows(tuned, ["default", "plain"]):
        tuned(x).square().sum().backward()
    together = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    tuned.zero_grad(set_to_none=True)
    for number, name in enumerate(("default", "plain")):
        with lora_fx.use(tuned, name):
            tuned(x[number : number + 1]).square().sum().backward()
    apart = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert together.keys() == apart.keys()
    assert len(apart) == 2 * 2 * CALLS + 2 * 2
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], atol=1e-5, rtol=1e-4)


# -- ALBERT: all layers are one


def albert() -> nn.Module:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=19, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                          intermediate_size=24, max_position_embeddings=32, initializer_range=0.3,
                          attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)  # fmt: skip
    return AlbertModel(config).eval()


def words(length: int = 6) -> Sample:
    torch.manual_seed(length)
    return lora_fx.call(input_ids=torch.randint(1, 19, (2, length)))


@both
def test_albert_gets_an_adapter_for_every_layer(backend: str, tmp_path):
    base = albert()
    tuned = lora_fx.apply(base, rules("**.{query,value,ffn}"), words(), backend=backend)
    assert torch.equal(run(tuned, words(9)), run(base, words(9)))
    assert len(factors(tuned)) == 3 * 2 * 3
    randomise_(tuned)
    result = run(tuned, words(9), grad=True)
    result.square().sum().backward()
    gradients = [factor.grad for factor in factors(tuned).values()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    assert relative(result, run(base, words(9))) > 1e-2
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(run(lora_fx.load(albert(), tmp_path, words()), words(9)), run(tuned, words(9)))
    assert same_values(lora_fx.remove(tuned), base)


def test_albert_equals_one_whose_layers_are_copies():
    tuned = lora_fx.apply(albert(), rules("**.{query,value,ffn}"), words(), backend="modules")
    randomise_(tuned)
    plain = albert()
    group = plain.encoder.albert_layer_groups[0]
    dense = []
    for call in range(3):
        layer = copy.deepcopy(group)
        for name, module in layer.named_modules():
            if name.endswith(("query", "value", "ffn")):
                source = tuned.encoder.albert_layer_groups[0].get_submodule(name)
                A, B = (source.get_submodule(f"lora_{factor}.default.{call}").weight for factor in "AB")
                module.weight = nn.Parameter(module.weight + SCALING * B @ A)
        dense.append(layer)
    plain.encoder.albert_layer_groups = nn.ModuleList(dense)
    plain.config.num_hidden_groups = plain.encoder.config.num_hidden_groups = 3
    assert relative(run(tuned, words()), run(plain, words())) <= 1e-5
