"""What `print(tuned)` shows: the model's own tree, with the adapter of each adapted layer among its facts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import nn

import lora_fx
from tests.support.compoundkinds import ATTENTION, EXPERTS
from tests.support.layerkinds import LAYERS, SUBCLASSES
from tests.support.rawkinds import OTHERS, PRODUCTS, VIEWED

MODEL = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False), nn.Conv1d(3, 2, 3))


def shown(model: nn.Module, **rule: object) -> str:
    lora = rule.pop("lora", {"r": 2, "alpha": 3})
    given = rule.pop("inputs", None)
    rules = {"rules": [{"match": {"name": "**"}, "lora": lora, **rule}]}
    return repr(lora_fx.apply(model, rules, given, backend="modules"))


def test_tree_is_the_models_own_and_adapters_are_facts_of_its_layers():
    assert shown(MODEL) == (
        "Sequential(\n"
        "  (0): Embedding(9, 6, lora r=2 scaling=1.5 adapter=default)\n"
        "  (1): LayerNorm((6,), eps=1e-05, elementwise_affine=True, bias=True)\n"
        "  (2): Linear(in_features=6, out_features=4, bias=False, lora r=2 scaling=1.5 adapter=default)\n"
        "  (3): Conv1d(3, 2, kernel_size=(3,), stride=(1,), lora r=2 scaling=1.5 adapter=default)\n"
        ")"
    )


def test_what_an_adapter_has_beside_its_rank_is_shown():
    model = nn.Sequential(nn.Linear(6, 4))
    lora = {"r": 2, "alpha": 4, "dropout": 0.1, "dora": True, "bias": True, "adapter": "french", "rslora": True}
    assert "lora r=2 scaling=2.82843 adapter=french dropout=0.1 dora bias)" in shown(model, lora=lora)
    sliced = shown(model, slices={"of": ["q", "k"], "adapt": ["k"]})
    assert (
        "(0): Linear(in_features=6, out_features=4, bias=True, lora r=2 scaling=1.5 adapter=default slices=k)" in sliced
    )


def test_module_that_is_called_twice_shows_its_adapters_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    text = shown(Twice(), per_call=True, inputs=(torch.ones(1, 4),))
    assert text.count("lora r=2") == 1
    assert "adapter=default calls=2)" in text


def test_class_with_a_text_of_its_own_keeps_it():
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)).eval()
    tuned = lora_fx.apply(gpt2, r=2, target="c_attn", backend="modules")
    assert "(c_attn): Conv1D(nf=24, nx=8, lora r=2 scaling=2 adapter=default)" in repr(tuned)

    class Odd(nn.Linear):
        def __repr__(self):
            return "odd\nlayer)"

    assert "odd\n  layer) lora r=2 scaling=1.5 adapter=default" in shown(nn.Sequential(Odd(4, 4)))


@pytest.mark.parametrize(
    "kind", [*LAYERS, *SUBCLASSES, *PRODUCTS, *VIEWED, *OTHERS, *ATTENTION, *EXPERTS], ids=lambda kind: kind.name
)
def test_every_kind_of_site_is_shown_and_no_module_of_ours(kind):
    base = kind.build()
    plain = repr(base)
    tuned = kind.adapted()
    text = repr(tuned)
    assert "lora_A" not in text
    assert "_lora)" not in text
    assert text.count("lora r=2 scaling=1.5 adapter=default") >= 1
    for name in kind.weights:
        path, _, parameter = name.rpartition(".")
        named = f"{parameter}: lora r=2" if parameter != "weight" else "lora r=2"
        assert named in repr(tuned.get_submodule(path)), name
    assert repr(base) == plain
    assert repr(lora_fx.remove(tuned)) == plain
    assert repr(lora_fx.merge(tuned)) == plain


def test_copies_and_saved_models_show_the_same():
    tuned = lora_fx.apply(MODEL, r=2, target="*", backend="modules")
    buffer = io.BytesIO()
    torch.save(tuned, buffer)
    buffer.seek(0)
    assert repr(copy.deepcopy(tuned)) == repr(torch.load(buffer, weights_only=False)) == repr(tuned)


def test_a_model_without_values_is_shown_too():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
    assert repr(lora_fx.apply(model, r=8, target="*")).count("lora r=8 scaling=2 adapter=default)") == 2


def test_an_adapter_that_is_off_says_so():
    tuned = lora_fx.apply(MODEL, r=2, target="2", backend="modules")
    with lora_fx.disabled(tuned):
        assert "lora r=2 scaling=2 adapter=default (off))" in repr(tuned)
    assert "(off)" not in repr(tuned)


def test_blocks_that_run_as_graphs_show_the_same():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    graphs = lora_fx.apply(model, r=2, target="*.0", example_inputs=(torch.ones(2, 4),))
    assert lora_fx.inspect(graphs).regions
    assert repr(graphs) == repr(lora_fx.apply(model, r=2, target="*.0", backend="modules"))


def test_a_graph_shows_its_nodes_and_the_factors_that_they_call():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 4)))
    tuned = lora_fx.apply(graph, r=2, target="0")
    text = str(tuned)
    assert "(default): LoRAFactor(6 → 2, scaling=2)" in text
    assert "(default): LoRAFactor(2 → 4)" in text
    assert "lora_A.default" in text.partition("def forward")[2]


def test_factors_of_a_convolution_show_their_matrices():
    tuned = lora_fx.apply(nn.Sequential(nn.Conv2d(3, 8, 5)), r=2, target="0", backend="modules")
    assert repr(tuned[0].lora_A["default"]) == "ConvolutionA(75 → 2, scaling=2)"
    assert repr(tuned[0].lora_B["default"]) == "ConvolutionB(2 → 8)"


def test_names_cannot_write_to_the_terminal():
    text = shown(nn.Sequential(nn.Linear(6, 4)), slices={"of": ["a\x1b[2J", "b"], "adapt": ["a\x1b[2J"]})
    assert "\x1b" not in text
    assert "slices=a\\x1b[2J" in text


def test_what_is_asked_of_a_layer_is_told_as_before():
    tuned = lora_fx.apply(MODEL, r=2, target="2", backend="modules")
    assert tuned[2].extra_repr() == MODEL[2].extra_repr()
