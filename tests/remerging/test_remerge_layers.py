"""remerge: layers that others wrote become plain layers, in models and in graphs, PEFT's and our own too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

import lora_fx
from lora_fx import passes
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.whole import remerged
from tests.support import foreign, zoo
from tests.support.foreign import between, randomised
from tests.support.remerged import TOLERANCE, X, assert_equal, names, needs, targets
from tests.support.zoo import rules

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
    assert [type(module) for module in plain] == [nn.Linear, nn.GELU, nn.Linear, nn.ReLU, nn.Linear]
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


def test_matrix_of_addmm_may_be_given_by_its_name():
    class Named(foreign.LinearWithLoRA):
        def forward(self, x):
            base = torch.addmm(self.linear.bias, x, mat2=self.linear.weight.t())
            return base + torch.mm(torch.mm(x, self.lora.A), mat2=self.lora.B)

    model = randomised(nn.Sequential(Named()))
    result = remerged(fx.symbolic_trace(model))
    assert result.folded == ("0.linear",)
    torch.testing.assert_close(result.model(X[0]), model(X[0]))


@needs("lycoris")
@pytest.mark.parametrize("bypass", [None, True])
def test_linears_that_lycoris_took_over_vanish_from_an_exported_graph(bypass):
    model = between(lambda: nn.Linear(16, 24))
    randomised(foreign.lycoris(model, bypass_mode=bypass))
    result = remerged(torch.export.export(model.eval(), (X,)))
    assert (result.folded, result.left) == (("0", "2", "4"), ())
    assert "_assert_tensor_metadata" not in str(result.model.graph)
    assert_equal(result.model, model)


@needs("lycoris")
@pytest.mark.parametrize("bypass", [None, True])
def test_linears_that_lycoris_took_over_become_plain_linears(bypass):
    model = between(lambda: nn.Linear(16, 24))
    network = foreign.lycoris(model, bypass_mode=bypass)
    randomised(network)
    result = remerged(model.eval())
    print(f"{len(result.folded)} folded")
    assert result.folded == ("0", "2", "4")
    assert all("forward" not in vars(module) for module in result.model.modules())
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
        *((lambda way=way: foreign.Stacked(way), ["q", "k", "v"]) for way in ("chunk", "split", "narrow", "slices")),
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
