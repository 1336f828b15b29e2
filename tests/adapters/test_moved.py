"""PiSSA and OLoRA: A and B start as parts of the weight, and the model at its base all the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.adapters.factors.decompositions import decomposed
from lora_fx.adapters.factors.moved import MovedA, MovedB, take_plain
from lora_fx.errors import RefusedError, RuleError
from tests.support.zoo import VOCABULARY

INITS = ("pissa", "pissa_niter_4", "olora")
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(12, 16)), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ self.w))


def rules(init: str = "pissa", name: str = "*", **lora: Any) -> dict[str, Any]:
    return {"rules": [{"match": {"name": name}, "lora": {"r": 4, "alpha": 8, "init": init, **lora}}]}


def trained(tuned: nn.Module, x: Tensor = X, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        tuned(x).float().square().mean().backward()
        optimizer.step()
    return tuned


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (Pair, "graph"),
        (Pair, "modules"),
        (Raw, "auto"),
        (Raw, "modules"),
        (lambda: fx.symbolic_trace(Raw()), "auto"),
    ],
    ids=["layers in graphs", "layers", "raw", "raw modules", "a graph of its own"],
)
def test_an_adapted_model_starts_at_its_base_bit_by_bit(make, backend, init):
    base = make()
    before = copy.deepcopy(base.state_dict())
    tuned = lora_fx.apply(base, rules(init), (X,), backend=backend)
    assert torch.equal(tuned(X), base(X))
    tuned.train()
    assert torch.equal(tuned(X), base(X))
    assert all(bool(adapter.lora_B.weight.any()) for _, adapter in all_attached(tuned))
    trained(tuned)
    assert not torch.allclose(tuned(X), base(X), atol=1e-3)
    assert torch.equal(lora_fx.remove(tuned)(X), base(X))
    with lora_fx.disabled(tuned):
        assert torch.equal(tuned(X), base(X))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("init", INITS)
def test_with_dropout_and_in_bfloat16_it_starts_at_its_base_too(init):
    base = Pair().bfloat16()
    tuned = lora_fx.apply(base, rules(init, dropout=0.5), (X.bfloat16(),)).train()
    assert torch.equal(tuned(X.bfloat16()), base(X.bfloat16()))
    assert next(all_attached(tuned))[1].lora_A.weight.dtype == torch.float32


def test_scaling_times_the_product_is_what_the_weight_is_mostly_made_of():
    weight = torch.randn(10, 7, dtype=torch.float64)
    A, B = decomposed("pissa", weight, 3, 2.0)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.0 * B @ A, left[:, :3] @ torch.diag(values[:3]) @ right[:3])
    torch.testing.assert_close(A.square().sum(1), values[:3] / 2.0)
    steep = left @ torch.diag(2.0 ** -torch.arange(7)).double() @ right
    (A, B), (fast_A, fast_B) = (decomposed(init, steep, 3, 2.0) for init in ("pissa", "pissa_niter_16"))
    torch.testing.assert_close(fast_B @ fast_A, B @ A)
    A, B = decomposed("olora", weight, 3, 2.0)
    torch.testing.assert_close(B.mT @ B, torch.eye(3, dtype=torch.float64))
    assert torch.equal(A, A.triu())


def test_gradients_are_those_of_factors_on_what_is_left_of_the_base():
    torch.manual_seed(0)
    layer = nn.Linear(12, 16).double()
    tuned: Any = trained(lora_fx.apply(nn.Sequential(layer), rules()), X.double())
    adapter = next(all_attached(tuned))[1]
    tuned.zero_grad()
    tuned(X.double()).square().sum().backward()
    A, B = (factor.weight.detach().clone().requires_grad_() for factor in (adapter.lora_A, adapter.lora_B))
    rest = layer.weight.detach() - 2.0 * adapter.lora_B.start @ adapter.lora_A.start
    (X.double() @ (rest + 2.0 * B @ A).t() + layer.bias.detach()).square().sum().backward()
    torch.testing.assert_close(adapter.lora_A.weight.grad, A.grad)
    torch.testing.assert_close(adapter.lora_B.weight.grad, B.grad)


def test_a_change_that_is_small_beside_its_start_is_not_rounded_away():
    A, B = MovedA(torch.zeros(2, 6)), MovedB(torch.zeros(5, 2))
    A.begin(1000 * torch.randn(2, 6))
    B.begin(1000 * torch.randn(5, 2))
    with torch.no_grad():
        B.weight += 0.5
    exact = torch.full((5, 2), 0.5, dtype=torch.float64) @ A.weight.double()
    ours = (B.matrix @ A.matrix).double()
    plain = (B.weight @ A.weight - B.start @ A.start).double()
    assert (ours - exact).abs().max() < 1e-3 * exact.abs().max()
    assert (ours - exact).abs().max() < (plain - exact).abs().max()
    first, second = A.plain, B.plain
    others = MovedA(torch.zeros(2, 6)), MovedB(torch.zeros(5, 2))
    take_plain(*others, first, second)
    assert all(
        torch.equal(getattr(mine, name), getattr(other, name))
        for mine, other in zip((A, B), others, strict=True)
        for name in ("weight", "start")
    )


def test_merged_weights_have_what_was_trained():
    base = Pair()
    tuned = trained(lora_fx.apply(base, rules(), (X,)))
    merged = lora_fx.merge(tuned)
    torch.testing.assert_close(merged(X), tuned(X))
    assert type(merged.a) is nn.Linear
    assert set(merged.state_dict()) == set(base.state_dict())


def test_copies_pickles_and_state_dicts_have_where_an_adapter_started():
    tuned = trained(lora_fx.apply(Pair(), rules("pissa_niter_4"), (X,)))
    for same in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(same(X), tuned(X))
    base = lora_fx.remove(tuned)
    torch.manual_seed(99)
    by_state, by_adapter = (lora_fx.apply(base, rules("pissa_niter_4"), (X,)) for _ in range(2))
    by_state.load_state_dict(tuned.state_dict())
    lora_fx.load_adapter_state(by_adapter, lora_fx.adapter_state(tuned))
    assert torch.equal(by_state(X), tuned(X))
    assert torch.equal(by_adapter(X), tuned(X))
    assert {name.rpartition(".")[2] for name in lora_fx.adapter_state(tuned)} == {"weight", "start"}


def test_compiled_blocks_and_siblings_train_alike():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=2, vocab_size=VOCABULARY
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, VOCABULARY, (2, 7))
    given = {"input_ids": ids, "labels": ids}
    losses = []
    for settings in ({"backend": "modules"}, {}, {"optimise": ["stack", "recompute", "compile"]}):
        tuned = lora_fx.apply(base, rules(name="**.{q,k,v}_proj"), given, **settings)
        assert torch.equal(tuned.eval()(**given).loss, base.eval()(**given).loss)
        optimizer = torch.optim.SGD(lora_fx.parameters(tuned.train()), lr=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = tuned(**given).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_the_plan_says_how_sites_start_and_which_cannot():
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.conv, self.small = nn.Embedding(9, 12), nn.Conv1d(12, 12, 1), nn.Linear(12, 3)
            self.fused = nn.Linear(12, 12)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.conv(self.tokens(ids).mT).mT
            return self.small(self.fused(x))

    base = Kinds()
    plan = lora_fx.plan(base, rules(), (torch.arange(5)[None],))
    assert "init=pissa" in str(plan)
    assert {site.path: site.reason for site in plan.refused} == {
        "tokens": "init pissa is for one whole matrix, not for embedding",
        "conv": "init pissa is for one whole matrix, not for conv1d",
        "small": "init pissa needs 4 singular values for r=4, its weight has 3",
    }
    sliced = {**rules(name="fused")["rules"][0], "slices": {"of": ["q", "k"], "adapt": ["q"]}}
    with pytest.raises(RefusedError, match="one whole matrix, not for slices"):
        lora_fx.apply(base, {"rules": [sliced]})
    with pytest.raises(RefusedError, match="init pissa and DoRA are not combined"):
        lora_fx.apply(base, rules(name="fused", dora=True))


@pytest.mark.parametrize("init", ["pisa", "pissa_niter_", "pissa_niter_0", "pissa_niter_100", "PiSSA"])
def test_an_unknown_scheme_is_refused(init):
    with pytest.raises(RuleError, match=r"is unknown[\s\S]*pissa"):
        lora_fx.plan(Pair(), rules(init))


def test_packed_weights_are_refused():
    class Packed(nn.Linear):
        pass

    base = nn.Sequential(Packed(12, 16))
    base[0].weight = nn.Parameter(torch.zeros(16, 6, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RefusedError, match="init pissa needs the numbers of the weights"):
        lora_fx.apply(base, rules())


def test_on_the_meta_device_nothing_is_decomposed():
    with torch.device("meta"):
        tuned = lora_fx.apply(Pair(), rules())
    assert all(adapter.lora_A.start.is_meta for _, adapter in all_attached(tuned))


def test_extracting_wants_no_first_values():
    base = Pair()
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.a.weight += 0.1
    with pytest.raises(RefusedError, match="leave out `init: pissa`"):
        lora_fx.extract(other, base, r=4, rules=rules(name="a"))


def test_beside_other_adapters_each_keeps_its_own_start():
    base = Pair()
    tuned = trained(lora_fx.apply(base, rules(), (X,)))
    first = tuned(X)
    lora_fx.add(tuned, rules("olora"), adapter="b")
    assert torch.equal(tuned(X), first)
    lora_fx.use(tuned, "b")
    assert torch.equal(tuned(X), base(X))
    second = trained(tuned)(X)
    lora_fx.use(tuned, {"default": 0.7, "b": -0.3})
    torch.testing.assert_close(lora_fx.merge(tuned)(X), tuned(X))
    lora_fx.use(tuned, "default")
    assert torch.equal(tuned(X), first)
    with lora_fx.rows(tuned, ["default", None, "b", "b", "default"]):
        mixed = tuned(X)
    torch.testing.assert_close(mixed[[0, 4]], first[[0, 4]])
    torch.testing.assert_close(mixed[[2, 3]], second[[2, 3]])
    assert torch.equal(mixed[1], base(X)[1])
