"""LoRA-FA: A stays as it starts, B gets the gradients of plain LoRA, and the input of a layer is not kept for them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.bench.counters import saved_bytes
from lora_fx.passes.verify import verify
from tests.support import zoo
from tests.support.compoundkinds import ATTENTION, EXPERTS
from tests.support.layerkinds import LAYERS
from tests.support.rawkinds import OTHERS, PRODUCTS
from tests.support.sitekinds import BACKENDS, Kind, factors_of, randomise_, run

ROWS, IN, OUT, RANK = 32, 24, 20, 2
FLOAT = 4
KINDS = [k for k in (*LAYERS, *PRODUCTS, *OTHERS, *ATTENTION, *EXPERTS) if "embedding" not in k.name and k.double]


def both(kind: Kind, backend: str, **lora: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model with plain LoRA and one with LoRA-FA, of the same values, in float64."""
    made = []
    for frozen in (False, True):
        rules = kind.rules()
        rules["rules"][0]["lora"] |= {"lora_fa": frozen, **lora}
        sample = kind.sample(torch.float64)
        tuned = lora_fx.apply(kind.build(torch.float64), rules, sample, backend=backend)
        randomise_(tuned)
        made.append(tuned)
    return made[0], made[1]


def gradients(kind: Kind, tuned: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of A and B by the name of their weight."""
    result = run(tuned, kind.sample(torch.float64), training=True, grad=True)
    result.backward(torch.linspace(-1, 1, len(result), dtype=result.dtype))
    return {name: tuple(factor.grad for factor in factors_of(tuned, name)) for name in kind.weights}  # type: ignore[misc]


def is_embedding(kind: Kind) -> bool:
    plan = lora_fx.plan(kind.build(), kind.rules(), kind.sample())
    return any(site.op == "embedding" for site in plan.adapted)


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] if name == "auto" else []) for name in BACKENDS]
)
@pytest.mark.parametrize("kind", [k for k in KINDS if k.quick], ids=lambda kind: kind.name)
@pytest.mark.sampled(2)
def test_b_gets_the_gradient_of_plain_lora_and_a_none(kind: Kind, backend: str):
    if is_embedding(kind):
        with pytest.raises(lora_fx.RefusedError, match="LoRA-FA would leave A of an embedding at zero"):
            both(kind, backend)
        return
    plain, frozen = both(kind, backend)
    expected, found = gradients(kind, plain), gradients(kind, frozen)
    for name, (of_a, of_b) in found.items():
        assert of_a is None
        other = expected[name][1]
        assert of_b is not None
        assert other is not None
        assert (of_b - other).abs().max() <= 1e-12 * other.abs().max(), name


# -- what is kept


class OneLayer(nn.Module):
    """A layer on an input that is made of a parameter, by an operation that does not keep it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def linear() -> nn.Module:
    return OneLayer(nn.Linear(IN, OUT))


def kept(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps of a forward pass, but for parameters."""
    given = x.clone().requires_grad_()
    return saved_bytes(lambda: model.train()(given), (*model.parameters(), *model.buffers()))


def rules(**lora: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": "**.layer"}, "lora": {"r": RANK, **lora}}]}


def of_modules(base: nn.Module, **lora: Any) -> nn.Module:
    return lora_fx.apply(base, rules(**lora), backend="modules")


def of_graphs(base: nn.Module, x: Tensor, **lora: Any) -> nn.Module:
    return lora_fx.apply(base, rules(**lora), (x,))


def own_graph(base: nn.Module, **lora: Any) -> nn.Module:
    return lora_fx.apply(fx.symbolic_trace(base), rules(**lora))


X = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(0))
MADE = {
    "modules": of_modules,
    "graphs": lambda base, **lora: of_graphs(base, X, **lora),
    "own graph": own_graph,
}


@pytest.mark.parametrize("where", MADE)
def test_a_layer_keeps_x_a_and_not_x(where: str):
    torch.manual_seed(0)
    plain, frozen = MADE[where](linear()), MADE[where](linear(), lora_fa=True)
    inner, x = FLOAT * ROWS * RANK, FLOAT * ROWS * IN
    assert kept(plain, X) >= x
    assert kept(frozen, X) == inner


def test_dropout_keeps_a_seed_and_no_more():
    frozen = of_modules(linear(), lora_fa=True, dropout=0.25)
    assert kept(frozen, X) == FLOAT * ROWS * RANK


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same"}, {"padding": "valid"}, {"groups": 2}, {"dilation": 2}],
    ids=str,
)
def test_a_convolution_keeps_h_and_not_its_input(dims: int, settings: dict[str, Any]):
    build = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    torch.manual_seed(0)
    base = OneLayer(build(8, 8, 3, **settings))
    x = torch.randn(2, 8, *(9 - dims for _ in range(dims)))
    plain, frozen = of_modules(base), of_modules(base, lora_fa=True)
    groups, results = settings.get("groups", 1), base(x)[0, 0].numel() * len(x)
    repeated = FLOAT * RANK * 8 * 3**dims if groups > 1 else 0
    assert kept(plain, x) >= FLOAT * x.numel()
    assert kept(frozen, x) == FLOAT * groups * RANK * results + repeated
    gradients = []
    for model in (plain, frozen):
        zoo.randomise_(model)
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        gradients.append([given.grad, model.layer.lora_B["default"].weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_convolution_with_a_border_that_is_not_of_zeros_keeps_its_input_and_is_right():
    base = OneLayer(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    x = torch.randn(2, 4, 5, 5)
    frozen = of_modules(base, lora_fa=True)
    assert kept(frozen, x) >= FLOAT * x.numel()


class Siblings(nn.Module):
    """Three layers on the output of a norm, as q, k and v, and one on a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.RMSNorm(IN), nn.Linear(IN, IN)
        self.q, self.k, self.v = (nn.Linear(IN, IN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        given = self.norm(x)
        made: Tensor = x + self.v(given) + self.out(nn.functional.silu(self.q(given)) * self.k(given))
        return made


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Siblings(), Siblings()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


STACK = {"version": 1, "rules": [{"match": {"name": "blocks.*.{q,k,v,out}"}, "lora": {"r": RANK}}]}


def stacks(optimise: Any = True, **lora: Any) -> tuple[nn.Module, nn.Module]:
    """Return a stack of blocks with plain LoRA and with LoRA-FA, as graphs."""
    x = torch.randn(2, 8, IN)
    made = []
    for frozen in (False, True):
        torch.manual_seed(0)
        chosen = copy.deepcopy(STACK)
        chosen["rules"][0]["lora"] |= {"lora_fa": frozen, **lora}
        tuned = lora_fx.apply(Stack(), chosen, (x,), optimise=optimise)
        zoo.randomise_(tuned)
        made.append(tuned)
    return made[0], made[1]


def frozen_base(x: Tensor) -> int:
    torch.manual_seed(0)
    return kept(Stack().requires_grad_(False), x)


@pytest.mark.parametrize("optimise", [True, ["stack"], ["recompute"], False], ids=str)
def test_graphs_keep_no_more_than_the_frozen_base_and_h(optimise: Any):
    x = torch.randn(2, 8, IN)
    plain, frozen = stacks(optimise)
    inner = 2 * 4 * FLOAT * 2 * 8 * RANK
    assert kept(frozen, x) <= min(frozen_base(x) + inner, kept(plain, x))
    first, second = (_step(model, x) for model in (plain, frozen))
    assert second.keys() == {name for name in first if "lora_A" not in name}
    assert all(torch.equal(first[name], grad) for name, grad in second.items())


def _step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_autocast_and_dropout_give_b_the_gradients_of_plain_lora():
    x = torch.randn(2, 8, IN)
    plain, frozen = stacks(dropout=0.3)
    for around in (lambda model: model(x), lambda model: checkpoint(model, x, use_reentrant=False)):
        found = []
        for model in (plain, frozen):
            model.train().zero_grad()
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                around(model).float().square().sum().backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


# -- gradients of gradients


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_of_gradients_are_those_of_plain_lora(dropout: float):
    torch.manual_seed(0)
    base, found = linear().double(), []
    x = X.double().requires_grad_()
    for frozen in (False, True):
        model = of_modules(base, lora_fa=frozen, dropout=dropout).train()
        zoo.randomise_(model)
        B = model.layer.lora_B["default"].weight
        torch.manual_seed(3)
        made = model(x)
        first = torch.autograd.grad(made.square().sum(), (x, B), create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), (x, B))
        found.append([*first, *second])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-12 * one.abs().max()


def test_a_gradient_that_reaches_x_through_the_gradient_of_b_alone_is_right():
    base, found = linear().double(), []
    x = X.double().requires_grad_()
    for frozen in (False, True):
        model = of_modules(base, lora_fa=frozen)
        zoo.randomise_(model)
        (of_b,) = torch.autograd.grad(model(x).sum(), model.layer.lora_B["default"].weight, create_graph=True)
        found.append(torch.autograd.grad(of_b.square().sum(), x)[0])
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[0].abs().max()


def test_several_gradients_at_once_are_those_of_one_after_the_other():
    model = of_modules(linear(), lora_fa=True)
    zoo.randomise_(model)
    x = X.clone().requires_grad_()
    y, B = model(x), model.layer.lora_B["default"].weight
    slopes = torch.randn(3, *y.shape)
    at_once = torch.autograd.grad(y, (x, B), slopes, is_grads_batched=True, retain_graph=True)
    for number, slope in enumerate(slopes):
        alone = torch.autograd.grad(y, (x, B), slope, retain_graph=True)
        assert all(torch.allclose(one[number], other, atol=1e-5) for one, other in zip(at_once, alone, strict=True))


# -- what holds it


def test_a_is_no_parameter_that_is_trained_and_is_in_the_state():
    tuned = of_modules(linear(), lora_fa=True, bias=True)
    names = {id(p): name for name, p in tuned.named_parameters()}
    trained = {names[id(p)] for p in lora_fx.parameters(tuned)}
    assert trained == {"layer.lora_B.default.weight", "layer.bias"}
    assert trained == {names[id(p)] for p in lora_fx.parameters(tuned, "default")}
    groups = lora_fx.param_groups(tuned, lr=0.1, lora_plus=16)
    assert {group["name"] for group in groups} == {"B", "rest"}
    assert set(lora_fx.adapter_state(tuned)) == {*trained, "layer.lora_A.default.weight"}
    assert lora_fx.inspect(tuned).trainable == RANK * OUT + OUT
    plan = lora_fx.plan(linear(), rules(lora_fa=True, bias=True))
    assert plan.trainable == RANK * OUT + OUT
    assert " lora_fa" in str(plan)
    assert " lora_fa" in repr(tuned)


@pytest.mark.parametrize("where", MADE)
def test_copies_leave_a_frozen(where: str):
    tuned = copy.deepcopy(MADE[where](linear(), lora_fa=True))
    verify(tuned)
    assert not tuned.layer.lora_A["default"].weight.requires_grad


def test_a_pickled_model_leaves_a_frozen_and_keeps_as_little():
    tuned = pickle.loads(pickle.dumps(of_modules(linear(), lora_fa=True)))
    verify(tuned)
    assert kept(tuned, X) == FLOAT * ROWS * RANK


def test_verify_sees_an_a_that_requires_a_gradient():
    tuned = of_modules(linear(), lora_fa=True)
    tuned.layer.lora_A["default"].weight.requires_grad_()
    with pytest.raises(lora_fx.LoraFxError, match="LoRA-FA freezes it"):
        verify(tuned)


def test_an_a_that_is_let_free_is_trained_and_right():
    plain, frozen = of_modules(linear()), of_modules(linear(), lora_fa=True)
    frozen.load_state_dict(plain.state_dict())
    for model in (plain, frozen):
        zoo.randomise_(model)
        model.layer.lora_A["default"].weight.requires_grad_()
        model(X).square().sum().backward()
    assert torch.equal(*(model.layer.lora_A["default"].weight.grad for model in (plain, frozen)))


@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"dora": True}, {"init": "orthogonal"}], ids=str)
def test_other_methods_train_b_as_with_a_trained_a(lora: dict[str, Any]):
    torch.manual_seed(0)
    base = linear().double()
    steps = []
    for frozen in (False, True):
        torch.manual_seed(1)
        tuned = of_modules(base, lora_fa=frozen, **lora)
        steps.append(_step(tuned, X.double()))
    assert steps[1].keys() == {name for name in steps[0] if "lora_A" not in name}
    assert all((steps[0][n] - g).abs().max() <= 1e-12 * g.abs().max() for n, g in steps[1].items())


def test_several_adapters_of_which_one_is_frozen_keep_x_for_the_other():
    tuned = of_modules(linear(), lora_fa=True)
    lora_fx.add(tuned, rules(adapter="b"))
    lora_fx.use(tuned, ["default", "b"])
    assert kept(tuned, X) >= FLOAT * ROWS * IN
    lora_fx.use(tuned, "default")
    assert kept(tuned, X) == FLOAT * ROWS * RANK
    lora_fx.add(tuned, rules(adapter="c", lora_fa=True))
    assert [one.spec.adapter for _, one in all_attached(tuned) if not one.lora_A.weight.requires_grad] == [
        "default",
        "c",
    ]


def test_rows_with_frozen_and_trained_adapters_get_their_own_gradients():
    tuned = of_modules(linear(), lora_fa=True)
    lora_fx.add(tuned, rules(adapter="b"))
    zoo.randomise_(tuned)
    with lora_fx.rows(tuned, ["default", "b", None, "default"]):
        tuned(X[:4]).square().sum().backward()
    together = {n: p.grad.clone() for n, p in tuned.named_parameters() if p.grad is not None}
    assert "layer.lora_A.default.weight" not in together
    tuned.zero_grad()
    lora_fx.use(tuned, "default")
    tuned(X[[0, 3]]).square().sum().backward()
    assert torch.allclose(together["layer.lora_B.default.weight"], tuned.layer.lora_B["default"].weight.grad, atol=1e-5)


def test_merging_and_taking_away_know_no_difference():
    tuned = of_modules(linear(), lora_fa=True)
    zoo.randomise_(tuned)
    assert torch.allclose(lora_fx.merge(tuned)(X), tuned(X), atol=1e-5)
    base = linear()
    assert torch.equal(lora_fx.remove(lora_fx.apply(base, rules(lora_fa=True)))(X), base(X))
