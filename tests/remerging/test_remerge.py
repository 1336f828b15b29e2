"""remerge: LoRAs that others wrote are found by their structure and folded; what only looks like one is left alone."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import lora_fx
from lora_fx import passes
from lora_fx.errors import InvariantError, LoraFxWarning, MergeError
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.whole import remerged
from tests.support import foreign, zoo
from tests.support.foreign import between, randomised
from tests.support.zoo import rules

X = zoo.features(2, 3)
TOLERANCE = 1e-6


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def assert_equal(one: nn.Module, other: nn.Module, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        difference = (one(X) - other(X)).abs().max().item()
    assert difference <= tolerance


def targets(graph_module: fx.GraphModule) -> str:
    return " ".join(str(node.target) for node in graph_module.graph.nodes)


# -- layers become plain layers

LAYERS = {
    "textbook": foreign.LinearWithLoRA,
    "textbook, on the weight": foreign.LinearWithLoRAMerged,
    "transposed": foreign.Transposed,
    "in place": foreign.AddsInPlace,
    "two adapters": foreign.TwoAdapters,
    "factors with biases": foreign.WithBiases,
    "parametrized": foreign.parametrized,
    "loralib": pytest.param(foreign.loralib_linear, marks=needs("loralib")),
    "loralib, fan_in_fan_out": pytest.param(
        lambda: foreign.loralib_linear(fan_in_fan_out=True), marks=needs("loralib")
    ),
    "loralib, merged": pytest.param(lambda: foreign.loralib_linear(merge_weights=True), marks=needs("loralib")),
    "loralib, fused": pytest.param(foreign.loralib_merged_linear, marks=needs("loralib")),
    "loralib, fused, fan_in_fan_out": pytest.param(
        lambda: foreign.loralib_merged_linear(fan_in_fan_out=True), marks=needs("loralib")
    ),
    "peft": pytest.param(foreign.peft_linear, marks=needs("peft")),
    "peft, dropout": pytest.param(lambda: foreign.peft_linear(lora_dropout=0.1), marks=needs("peft")),
    "peft, rank-stabilised": pytest.param(
        lambda: foreign.peft_linear(use_rslora=True, lora_alpha=3), marks=needs("peft")
    ),
    "peft, bias on B": pytest.param(lambda: foreign.peft_linear(lora_bias=True), marks=needs("peft")),
}
EACH_LAYER = pytest.mark.parametrize(
    "make", [v if hasattr(v, "marks") else pytest.param(v) for v in LAYERS.values()], ids=list(LAYERS)
)


@EACH_LAYER
def test_layer_becomes_a_plain_linear_in_a_model_of_the_same_structure(make):
    model = randomised(between(make))
    before = copy.deepcopy(model.state_dict())
    result = remerged(model)
    print(f"{len(result.folded)} folded")
    assert len(result.folded) == 1
    assert result.left == ()
    plain = result.model
    while not isinstance(plain[2], nn.Linear):  # PEFT's layer stands in a model of its own
        plain[2] = plain[2].get_base_model()[0]
    assert [type(each) for each in plain] == [nn.Linear, nn.GELU, nn.Linear, nn.ReLU, nn.Linear]
    assert names(plain) == {f"{index}.{name}" for index in (0, 2, 4) for name in ("weight", "bias")}
    assert_equal(plain, model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


UNTRACEABLE = ("peft", "loralib, fused")
"""What torch.fx's own tracer cannot follow."""


@pytest.mark.parametrize("trace", ["fx", "export"])
@EACH_LAYER
def test_layer_vanishes_from_a_graph(make, trace, request):
    if trace == "fx" and any(name in request.node.name for name in UNTRACEABLE):
        pytest.skip("torch.fx.symbolic_trace refuses it")
    model = randomised(between(make))
    graph = fx.symbolic_trace(model) if trace == "fx" else torch.export.export(model, (X,)).module()
    work = Remerge()
    result = passes.run(graph, [work])
    plain, left = result.graph_module, work.left
    if not work.folded:  # a linear with a parametrization is a leaf of torch.fx's tracer; a merged one is plain
        whole = remerged(graph)
        plain, left = whole.model, list(whole.left)
    assert left == []
    assert isinstance(plain, fx.GraphModule)
    if not work.folded:
        assert len(plain.graph.nodes) == len(graph.graph.nodes)
    else:
        assert not any(word in targets(plain) for word in ("lora.", "lora_", "down", "mask"))
    assert_equal(plain, graph)
    plain.graph.lint()


@needs("lycoris")
@pytest.mark.parametrize("bypass", [None, True])
def test_linears_that_lycoris_took_over_become_plain_linears(bypass):
    model = between(lambda: nn.Linear(16, 24))
    network = foreign.lycoris(model, bypass_mode=bypass)
    randomised(network)
    result = remerged(model.eval())
    print(f"{len(result.folded)} folded")
    assert result.folded == ("0", "2", "4")
    assert all("forward" not in vars(each) for each in result.model.modules())
    assert_equal(result.model, model)
    network.restore()
    with torch.no_grad():
        assert (result.model(X) - model(X)).abs().max() > 1e-3, "the product was there"


@needs("lycoris")
def test_parametrization_of_lycoris_becomes_a_parameter():
    from lycoris import LoConModule

    linear = nn.Linear(16, 16)
    randomised(LoConModule.parametrize(linear, "weight", lora_dim=4, alpha=2.0))
    model = nn.Sequential(linear).eval()
    result = remerged(model)
    assert result.folded == ("0.weight",)
    assert not parametrize.is_parametrized(result.model[0])
    assert_equal(result.model, model)
    assert parametrize.is_parametrized(model[0])
    assert model(X).shape == (2, 3, 16)


@pytest.mark.parametrize("how", ["fx", "export"])
@pytest.mark.parametrize(
    ("make", "sites"),
    [
        *(
            (lambda each=each: foreign.Stacked(each), ["q", "k", "v"])
            for each in ("chunk", "split", "narrow", "slices")
        ),
        (foreign.StackedAtTheCall, ["q", "v"]),
        (foreign.FusedProjection, ["qkv"]),
        (foreign.AddedToAPart, ["qkv"]),
    ],
    ids=["chunk", "split", "narrow", "slices", "cat of factors", "cat of products", "parts of a fused weight"],
)
def test_stacked_and_fused_forms_are_folded_in_graphs(make, sites, how):
    model = randomised(make())
    graph = fx.symbolic_trace(model) if how == "fx" else torch.export.export(model, (X,)).module()
    work = Remerge()
    plain = passes.run(graph, [work]).graph_module
    assert sorted(work.folded) == sorted(sites)
    assert work.left == []
    assert {name.rpartition(".")[0] for name in names(plain)} == set(sites)
    assert_equal(plain, graph)


def test_exported_program_comes_back_as_a_graph_module():
    model = randomised(between(foreign.LinearWithLoRA))
    plain = lora_fx.remerge(torch.export.export(model, (X,)))
    assert isinstance(plain, fx.GraphModule)
    assert "lora" not in targets(plain)
    assert_equal(plain, model)


def test_export_with_dynamic_shapes_is_folded_for_all_of_them():
    model = randomised(between(foreign.LinearWithLoRA))
    sizes = {"input": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    plain = lora_fx.remerge(torch.export.export(model, (X,), dynamic_shapes=sizes))
    other = zoo.features(5, 4)
    torch.testing.assert_close(plain(other), model(other), rtol=0, atol=TOLERANCE)


def test_layer_that_is_called_twice_is_folded_once():
    model = randomised(foreign.CalledTwice())
    assert remerged(model).folded == ("layer",)
    assert_equal(lora_fx.remerge(model), model)
    work = Remerge()
    plain = passes.run(fx.symbolic_trace(model), [work]).graph_module
    assert work.folded == ["layer.linear"]
    assert_equal(plain, model)


def test_layer_under_two_names_is_one_layer_afterwards():
    layer = foreign.LinearWithLoRA(16, 16)
    model = randomised(nn.Sequential(layer, nn.ReLU(), layer))
    plain = lora_fx.remerge(model)
    assert plain[0] is plain[2]
    assert_equal(plain, model)


def test_model_that_is_a_lora_layer_itself_becomes_its_base_layer():
    model = randomised(foreign.LinearWithLoRA())
    plain = lora_fx.remerge(model)
    assert type(plain) is nn.Linear
    assert_equal(plain, model)


def test_head_tied_to_the_embedding_is_folded_and_the_embedding_keeps_its_weight():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(24, 16), foreign.LinearWithLoRA()
            self.head.linear.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids)))

    ids = torch.arange(24)
    model = randomised(Tied())
    for given in (model, fx.symbolic_trace(model)):
        result = remerged(given)
        assert len(result.folded) == 1
        torch.testing.assert_close(result.model(ids), model(ids), rtol=0, atol=TOLERANCE)
        assert torch.equal(result.model.embedding.weight, model.embedding.weight)


# -- PEFT


@needs("peft")
@pytest.mark.filterwarnings("ignore")
def test_peft_model_of_a_transformer_becomes_the_base_model():
    import peft
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    settings = {"target_modules": "all-linear", "lora_dropout": 0.1, "alpha_pattern": {"q_proj": 3}}
    settings |= {"rank_pattern": {"down_proj": 2}, "task_type": "CAUSAL_LM"}
    theirs = randomised(peft.get_peft_model(base, peft.LoraConfig(**settings)))
    ids = torch.randint(0, 64, (2, 7))
    result = remerged(theirs, {"input_ids": ids})
    print(f"{len(result.folded)} folded")
    assert len(result.folded) == 14
    assert type(result.model) is transformers.LlamaForCausalLM
    assert not any("lora" in name for name in result.model.state_dict())
    assert set(result.model.state_dict()) == set(transformers.LlamaForCausalLM(config).state_dict())
    with torch.no_grad():
        assert (result.model(ids).logits - theirs(ids).logits).abs().max() <= TOLERANCE
        merged = theirs.merge_and_unload()
        assert (result.model(ids).logits - merged(ids).logits).abs().max() <= TOLERANCE


class Gpt2Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_attn = Conv1D(24, 16)

    def forward(self, x):
        return self.c_attn(x)


@needs("peft")
def test_conv1d_stays_a_conv1d():
    import peft

    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=4)
    model = randomised(peft.get_peft_model(Gpt2Layer(), config))
    plain = lora_fx.remerge(model)
    assert type(plain) is Gpt2Layer
    assert type(plain.c_attn).__name__ == "Conv1D"
    assert plain.c_attn.weight.shape == (16, 24)
    assert_equal(plain, model)


@needs("peft")
def test_several_active_adapters_of_peft_are_folded_together():
    import peft

    model = foreign.peft_linear(r=4)
    model.add_adapter("second", peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    randomised(model)
    assert_equal(lora_fx.remerge(model), model)


@needs("peft")
@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_adapter_that_is_merged_or_switched_off_leaves_the_layer_as_it_computes(state):
    model = randomised(foreign.peft_linear(r=4))
    model.merge_adapter() if state == "merged" else model.base_model.disable_adapter_layers()
    plain = lora_fx.remerge(model)
    assert type(plain[0]) is nn.Linear
    with torch.no_grad():
        assert torch.equal(plain(X), model(X))


@needs("peft")
def test_dora_of_peft_is_left_alone_and_the_model_stays_a_peft_model():
    model = randomised(foreign.peft_linear(use_dora=True))
    result = remerged(model)
    assert result.folded == ()
    assert result.left == (("base_model.model.0", "the scaling is computed from parameters"),)
    assert type(result.model) is type(model)


# -- our own


def test_our_own_adapters_are_folded():
    tuned = randomised(lora_fx.apply(zoo.Mlp().eval(), rules("**"), (X,)))
    result = remerged(tuned)
    assert result.folded == ("fc1", "fc2")
    assert_equal(result.model, tuned)


def test_our_own_nodes_in_a_graph_are_folded_by_their_structure():
    base = fx.symbolic_trace(zoo.Mlp().eval())
    tuned = lora_fx.apply(base, rules("**", dropout=0.1))
    randomised(tuned)
    plain = lora_fx.remerge(tuned)
    assert [node.name for node in plain.graph.nodes] == [node.name for node in base.graph.nodes]
    assert set(plain.state_dict()) == set(base.state_dict())
    assert_equal(plain, tuned)


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
    (foreign.NotThin, "its inner dimension 16 is not smaller than 16 and 24"),
    (foreign.BiasWithoutPlace, "it adds a bias to a linear that has none"),
]


@pytest.mark.parametrize(("make", "reason"), LOOKALIKES, ids=lambda each: getattr(each, "__name__", ""))
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
    "make", [make for make, _ in LOOKALIKES if make is not foreign.NotThin], ids=lambda each: each.__name__
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


# -- what is computed, and how it is rounded


def test_half_precision_weights_are_accumulated_in_float32_and_rounded_once():
    model = randomised(nn.Sequential(foreign.TwoAdapters())).to(torch.bfloat16)
    layer = model[0]
    exact = layer.linear.weight.float()
    for lora in (layer.lora, layer.other):
        exact = exact + lora.alpha * (lora.A.float() @ lora.B.float()).T
    plain = lora_fx.remerge(model)
    torch.testing.assert_close(plain[0].weight, exact.to(torch.bfloat16), rtol=2**-8, atol=0)
    assert (plain[0].weight != exact.to(torch.bfloat16)).float().mean() < 0.01, "a double rounding moves many"
    graph = lora_fx.remerge(fx.symbolic_trace(model))
    assert torch.equal(graph.get_submodule("0.linear").weight, plain[0].weight)


def test_float32_factors_that_widen_a_half_precision_sum_are_left_alone():
    class Wide(foreign.LinearWithLoRA):
        def forward(self, x):
            return self.linear(x) + self.lora(x.float())

    wide = randomised(Wide())
    wide.linear.to(torch.bfloat16)
    work = Remerge()
    passes.run(fx.symbolic_trace(wide), [work])
    assert work.left == [("linear", "the sum is torch.float32, the linear alone would be torch.bfloat16")]


def test_double_precision_stays_exact():
    model = randomised(between(foreign.LinearWithLoRA)).double()
    x = X.double()
    torch.testing.assert_close(lora_fx.remerge(model)(x), model(x), rtol=1e-13, atol=1e-13)


def test_meta_model_becomes_a_plain_meta_model():
    with torch.device("meta"):
        model = between(foreign.LinearWithLoRA).eval()
    plain = lora_fx.remerge(model)
    assert type(plain[2]) is nn.Linear
    assert plain[2].weight.is_meta


def test_flags_and_modes_of_the_base_layer_stay():
    model = randomised(nn.Sequential(foreign.LinearWithLoRA()))
    model[0].linear.weight.requires_grad_(False)
    plain = lora_fx.remerge(model)
    assert not plain[0].weight.requires_grad
    assert plain[0].bias.requires_grad
    assert not plain.training


def test_untouched_parameters_share_their_memory_with_the_given_model():
    model = randomised(between(foreign.LinearWithLoRA))
    plain = lora_fx.remerge(model)
    assert plain[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert plain[2].weight.data_ptr() != model[2].linear.weight.data_ptr()


def test_result_can_be_copied_and_pickled_without_the_library_that_made_the_layer():
    model = randomised(between(foreign.LinearWithLoRA))
    plain = lora_fx.remerge(model)
    assert_equal(copy.deepcopy(plain), model)


def test_remerge_twice_does_nothing_the_second_time():
    plain = lora_fx.remerge(randomised(between(foreign.LinearWithLoRA)))
    with pytest.warns(LoraFxWarning, match="no LoRA was found"):
        again = lora_fx.remerge(plain)
    assert torch.equal(again(X), plain(X))


# -- inputs, warnings, errors


def test_layers_are_read_from_their_real_calls_when_inputs_are_given():
    class TakesScale(foreign.LinearWithLoRA):
        def forward(self, x, twice):
            return self.linear(x) + (self.lora(x) * 2.0 if twice else self.lora(x))

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = TakesScale()

        def forward(self, x):
            return self.layer(x, True)

    model = randomised(Holds())
    without = remerged(model)
    assert without.left[0][1].startswith("its forward is not captured")
    with_inputs = remerged(model, (X,))
    assert with_inputs.left == (("layer", "the plain layer cannot be called as the layer is"),)


def test_what_is_left_alone_is_warned_of():
    with pytest.warns(
        LoraFxWarning, match="1 that look like a LoRA are left alone:\n  0: the scaling is a trained tensor"
    ):
        lora_fx.remerge(randomised(nn.Sequential(foreign.TrainedScaling())))


def test_fold_that_changes_the_results_for_the_example_inputs_is_an_error(monkeypatch):
    monkeypatch.setattr("lora_fx.remerging.modules._disagreement", lambda *args: "")
    monkeypatch.setattr("lora_fx.remerging.modules.refolded", lambda stored, *rest: stored.detach().clone())
    with pytest.raises(MergeError) as caught:
        lora_fx.remerge(randomised(between(foreign.LinearWithLoRA)), (X,))
    assert caught.value.problems == (("result 0", "(2, 3, 16) torch.float32"),)


def test_layer_whose_values_show_another_result_than_its_graph_is_left_alone(monkeypatch):
    monkeypatch.setattr("lora_fx.remerging.modules.refolded", lambda stored, *rest: stored.detach().clone())
    result = remerged(randomised(between(foreign.LinearWithLoRA)))
    assert result.left == (("2", "the folded layer gives something else"),)


def test_pass_checks_that_nothing_is_left_of_what_it_folded():
    graph = fx.symbolic_trace(randomised(between(foreign.LinearWithLoRA)))
    with pytest.raises(InvariantError) as caught:
        Remerge().ensures(graph)
    assert caught.value.problems == (("2.linear", "still there"),)


def test_product_that_shows_when_another_one_is_gone_is_folded_too():
    class Both(foreign.LinearWithLoRAMerged):
        def __init__(self) -> None:
            super().__init__()
            self.other = foreign.LoRALayer(16, 24)

        def forward(self, x):
            return super().forward(x) + self.other(x)

    graph = fx.symbolic_trace(randomised(Both()))
    work = Remerge()
    plain = passes.run(graph, [work]).graph_module
    assert work.folded == ["linear"]
    assert names(plain) == {"linear.weight", "linear.bias"}
    assert_equal(plain, graph)


def test_pass_keeps_a_journal_and_its_input():
    graph = fx.symbolic_trace(randomised(between(foreign.LinearWithLoRA)))
    before = str(graph.graph)
    result = passes.run(graph, [Remerge()])
    assert str(graph.graph) == before
    assert set(graph.state_dict()) > set(result.graph_module.state_dict())
    assert result.journal.count("set weight") == 1
    assert result.journal.count("drop weight") == 2
    assert {edit.by for edit in result.journal.edits} == {"remerge"}


def test_result_prints_counts_and_reasons():
    model = randomised(nn.Sequential(foreign.LinearWithLoRA(16, 16), foreign.DynamicScaling()))
    assert str(remerged(model)) == "1 folded, 1 left alone\n  1: the scaling depends on the input (mean)"
