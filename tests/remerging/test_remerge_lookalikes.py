"""remerge: what only looks like a LoRA, or cannot be folded, is left alone with its reason."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.remerging.algebra.operations import read_call
from lora_fx.remerging.algebra.shapes import bounds, slice_of
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.whole import remerged
from tests.support import foreign, zoo
from tests.support.foreign import randomised
from tests.support.remerged import X, assert_equal, names, needs

# -- pieces


@pytest.mark.parametrize(
    ("start", "length", "taken"),
    [(2, 3, (2, 5)), (-2, 2, (6, 8)), (0, "node", None), ("node", 3, None), (0, 8, (0, 8))],
)
def test_narrow_takes_what_is_known_of_its_numbers(start, length, taken):
    graph = fx.Graph()
    x, node = graph.placeholder("x"), graph.placeholder("n")
    numbers = [node if number == "node" else number for number in (start, length)]
    call = read_call(graph.call_function(torch.narrow, (x, -1, *numbers)), nn.Module())
    assert bounds(slice_of(call), 8) == taken


# -- lookalikes

LOOKALIKES = [
    (foreign.ActiveDropout, "dropout is active (p=0.1); put the model into eval mode"),
    (foreign.OfAnotherInput, "its input is x, the linear's is relu"),
    (foreign.OneColumn, "its shape broadcasts: 1 columns are added to 24"),
    (foreign.FactorUsedElsewhere, "a factor is used elsewhere too (sum_1)"),
    (foreign.InnerUsedElsewhere, "a value of the product is used elsewhere too (mean)"),
    (foreign.TrainedScaling, "the scaling is a trained tensor (scaling)"),
    (foreign.TrainedScalingOfWeights, "the scaling is a trained tensor (scaling)"),
    (foreign.DynamicScaling, "the scaling depends on the input (mean)"),
    (foreign.NonlinearBetween, "relu is not linear"),
    (foreign.OutputUsedElsewhere, "the linear's output is used without the product too (sigmoid)"),
    (foreign.SumUsedTwice, "the linear's output is used without the product too (add)"),
    (foreign.ProductUsedInAnotherSum, "a factor is used elsewhere too (matmul)"),
    (foreign.WeightUsedElsewhere, "its weight is read elsewhere too (mean), and must not change"),
    (foreign.TwoCallsOneProduct, "its weight is read elsewhere too (fc_1), and must not change"),
    (foreign.TwoCallsTwoProducts, "its weight is used several times, and not each time with the same product"),
    (foreign.NotThin, "its inner dimension 24 is not smaller than 16 or 24"),
    (foreign.BiasWithoutPlace, "it adds a bias to a linear that has none"),
]


@pytest.mark.parametrize(("make", "reason"), LOOKALIKES, ids=lambda value: getattr(value, "__name__", ""))
def test_lookalike_in_a_graph_is_left_alone_with_its_reason(make, reason):
    graph = fx.symbolic_trace(randomised(make()))
    before = str(graph.graph)
    work = Remerge()
    result = passes.run(graph, [work])
    assert work.left == [("fc", reason)]
    assert work.folded == []
    assert not result.modified
    assert str(result.graph_module.graph) == before


@pytest.mark.parametrize(
    "make", [make for make, _ in LOOKALIKES if make is not foreign.NotThin], ids=lambda kind: kind.__name__
)
def test_lookalike_in_a_model_is_left_alone(make):
    model = randomised(nn.Sequential(make()))
    result = remerged(model)
    assert result.folded == ()
    assert [path for path, _ in result.left] == ["0"]
    assert set(result.model.state_dict()) == set(model.state_dict())
    torch.manual_seed(0)
    before = model(X)
    torch.manual_seed(0)
    assert torch.equal(result.model(X), before)


def test_dropout_that_is_active_in_a_layer_is_the_reason_until_eval():
    model = randomised(nn.Sequential(foreign.LinearWithLoRA(dropout=0.1)))
    model.train()
    reason = "dropout is active (p=0.1); put the model into eval mode"
    assert remerged(model).left == (("0", reason),)
    assert remerged(model.eval()).folded == ("0",)


def test_factor_that_two_layers_share_keeps_both_as_they_are():
    one, other = foreign.LinearWithLoRA(16, 16), foreign.LinearWithLoRA(16, 16)
    other.lora.A = one.lora.A
    result = remerged(randomised(nn.Sequential(one, nn.ReLU(), other)))
    assert result.left == (
        ("0", "a factor is used elsewhere too (2.lora)"),
        ("2", "a factor is used elsewhere too (0.lora)"),
    )


def test_layer_with_hooks_is_left_alone():
    model = randomised(nn.Sequential(foreign.LinearWithLoRA()))
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    assert remerged(model).left == (("0", "it has hooks"),)


@needs("loralib")
def test_embeddings_and_convolutions_are_named():
    import loralib

    model = nn.ModuleDict({"e": loralib.Embedding(20, 16, r=4), "c": loralib.Conv2d(16, 24, 3, r=2)})
    randomised(model)
    result = remerged(model)
    assert ("e", "its base is an embedding, no linear") in result.left
    assert result.folded == ()


def test_weights_that_would_not_be_finite_are_left_alone():
    model = randomised(nn.Sequential(foreign.LinearWithLoRA()))
    with torch.no_grad():
        model[0].lora.A[0, 0] = float("inf")
    assert remerged(model).left == (("0", "the folded weight has NaN or infinite values"),)
    work = Remerge()
    passes.run(fx.symbolic_trace(model), [work])
    assert len(work.left) == 1


def test_lora_in_the_middle_of_a_forward_is_named_with_what_helps():
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.A, self.B = (
                nn.Linear(16, 24),
                nn.Parameter(torch.zeros(16, 4)),
                nn.Parameter(torch.zeros(4, 24)),
            )

        def forward(self, x):
            return torch.relu(self.fc(x) + x @ self.A @ self.B)

    model = randomised(nn.Sequential(Inline()))
    reason = "its forward does more than a linear and its LoRA; remerge the graph of a model that holds it"
    assert remerged(model).left == (("0", reason),)
    plain = lora_fx.remerge(fx.symbolic_trace(model))
    assert names(plain) == {"0.fc.weight", "0.fc.bias"}
    assert_equal(plain, model)


def test_lora_among_other_linears_of_a_block_is_named():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
            self.A, self.B = nn.Parameter(torch.zeros(4, 16)), nn.Parameter(torch.zeros(16, 4))

        def forward(self, x):
            return self.out(torch.tanh(self.q(x) + x @ self.A.T @ self.B.T))

    model = randomised(nn.Sequential(Block()))
    assert remerged(model).left[0][1].startswith("its forward does more than a linear and its LoRA")
    assert set(names(lora_fx.remerge(fx.symbolic_trace(model)))) == {
        f"0.{a}.{b}" for a in ("q", "out") for b in ("weight", "bias")
    }


def test_residuals_and_bottlenecks_of_ordinary_models_are_no_lookalikes():
    for model in (
        zoo.Gpt(),
        zoo.Encoder(),
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64)),
    ):
        result = remerged(model.eval())
        assert (result.folded, result.left) == ((), ())
