"""The situations in which PEFT 0.21 is silently wrong: lora_fx is right in each, or refuses it with a reason.

Each test shows both, so that it fails where PEFT has been repaired and the contrast is gone.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.errors import AdapterFileError, AdapterMismatchError, NoMatchError, RefusedError
from tests.support.kinds import EFFECT, OUTPUT, Attention, Padded, built, computed, distance, in_ours, in_peft, jitter_
from tests.support.zoo import randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))
SEQUENCE = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 5, 7, 9], [3, 4, 2, 8]])


class Lins(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        return self.lin1(self.lin0(x).tanh())


class Around(nn.Module):
    """Another module around a linear, or a stack of them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(8, 5)

    def forward(self, x):
        return self.out(self.inner(x).tanh())


def ours_is_right(base, chosen, *inputs, expected: torch.Tensor | None = None) -> nn.Module:
    """Adapt a model, with random values, and hold the merged one to it; return the adapted one."""
    tuned = lora_fx.apply(base, chosen, lora_fx.call(*inputs)).eval()
    randomise_(tuned)
    adapted = computed(tuned, inputs)
    assert distance(computed(base, inputs), adapted) > EFFECT
    assert distance(computed(lora_fx.merge(tuned), inputs), adapted) < OUTPUT
    if expected is not None:
        assert distance(adapted, expected) < OUTPUT
    return tuned


def theirs(base, **config) -> nn.Module:
    """Return PEFT's adapted copy, with random values."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **config))
    jitter_(model)
    return model.eval()


def merging_moves(model: nn.Module, *inputs) -> float:
    """Return how far PEFT's merged model is from its adapted one."""
    adapted = computed(model, inputs)
    return distance(computed(model.merge_and_unload(), inputs), adapted)


def test_01_one_of_several_targets_is_misspelt():
    base = built(Lins)
    assert theirs(base, target_modules=["lin0", "lin9"]).targeted_module_names == ["lin0"]
    chosen = {"version": 1, "rules": [{"match": {"name": name}, "lora": {"r": 4}} for name in ("lin0", "lin9")]}
    with pytest.raises(NoMatchError) as caught:
        lora_fx.apply(base, chosen)
    assert "lin9" in str(caught.value)
    ours_is_right(base, rules(["lin0", "lin1"]), X)


@pytest.mark.parametrize("target", ["linear1", "linear2", "self_attn"])
def test_02_encoder_layer_of_torch_in_eval_mode(target):
    def layers():
        return Around(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2))

    base = built(layers)
    before = computed(base, (SEQUENCE,))
    peft_model = theirs(base, target_modules=[target])
    assert distance(computed(peft_model, (SEQUENCE,)), before) < 5e-7
    assert distance(computed(peft_model.train(), (SEQUENCE,)), before) > EFFECT
    tuned = ours_is_right(base, rules(f"**.{target}" if "linear" in target else "**.self_attn.*"), SEQUENCE)
    in_eval = computed(tuned, (SEQUENCE,))
    assert distance(computed(tuned.train(), (SEQUENCE,)), in_eval) < OUTPUT


def test_03_all_linears_with_an_attention_of_torch_among_them():
    base = built(Attention)
    peft_model = theirs(base, target_modules="all-linear").train()
    peft_model(SEQUENCE).sum().backward()
    dead = [name for name, p in peft_model.named_parameters() if p.requires_grad and p.grad is None]
    assert len(dead) == 2
    assert all("mha.out_proj" in name for name in dead)
    tuned = ours_is_right(base, rules("**.out_proj"), SEQUENCE)
    tuned.train()(SEQUENCE).sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in lora_fx.parameters(tuned))


def test_04_attention_of_torch_as_a_target(tmp_path):
    base = built(Attention)
    peft_model = in_peft(base, tmp_path, r=4, target_modules=["mha"])
    trained, layer = computed(peft_model, (SEQUENCE,)), peft_model.base_model.model.mha
    delta = layer.base_layer.out_proj.get_delta_weight("default")
    twice = peft_model.merge_and_unload().mha.out_proj.weight - base.mha.out_proj.weight
    torch.testing.assert_close(twice, 2 * delta, rtol=0, atol=1e-6)
    tuned = ours_is_right(base, rules("mha.*"), SEQUENCE)
    adapter = next(adapter for _, adapter in all_attached(tuned) if adapter.owner is tuned.mha.out_proj)
    once = lora_fx.merge(tuned).mha.out_proj.weight - base.mha.out_proj.weight
    torch.testing.assert_close(once, adapter.delta(), rtol=0, atol=1e-6)
    read = lora_fx.load(base, tmp_path)  # what PEFT has trained with the delta added twice is read as it was trained
    assert distance(computed(read, (SEQUENCE,)), trained) < OUTPUT


def test_05_attention_of_torch_in_bfloat16_keeps_its_base_weights():
    base, inputs = built(Attention).bfloat16(), (SEQUENCE.bfloat16(),)
    before = base.mha.in_proj_weight.clone()
    peft_model = theirs(base, target_modules=["mha"])
    computed(peft_model, inputs)
    assert not torch.equal(peft_model.base_model.model.mha.base_layer.in_proj_weight, before)
    tuned = lora_fx.apply(base, rules("mha.*"), lora_fx.call(*inputs)).eval()
    randomise_(tuned)
    effect = distance(computed(tuned, inputs), computed(base, inputs))
    assert effect > EFFECT
    assert torch.equal(dict(tuned.named_parameters())["mha.in_proj_weight"], before)
    assert torch.equal(lora_fx.remove(tuned).mha.in_proj_weight, before)


def test_06_weight_of_a_child_that_is_used_by_a_function():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.out = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.out(F.linear(x, self.lin.weight).tanh())

    base = built(Reader)
    peft_model = theirs(base, target_modules=["lin"])
    assert torch.equal(computed(peft_model, (X,)), computed(base, (X,)))
    assert merging_moves(peft_model, X) > EFFECT
    ours_is_right(base, rules("lin"), X)


@pytest.mark.parametrize("names", [["head"], ["words"], ["head", "words"]])
def test_07_tied_weights_in_plain_torch(names):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids):
            return self.head(self.words(ids).tanh())

    base = built(Tied)
    assert merging_moves(theirs(base, target_modules=names), IDS) > EFFECT
    ours_is_right(base, rules(names), IDS)


def test_08_one_module_under_two_names():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x).tanh())

    base = built(Twice)
    peft_model = theirs(base, target_modules=["a", "b"])
    assert peft_model.targeted_module_names == ["a"]
    assert merging_moves(peft_model, X) > EFFECT
    for name in ("a", "b"):
        tuned = ours_is_right(base, rules(name), X)
        assert tuned.a is tuned.b


class Twofold(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    model = Around(nn.Linear(8, 8))
    model.inner.register_forward_hook(lambda module, args, output: 3 * output)
    return model


@pytest.mark.parametrize("make", [lambda: Around(Twofold(8, 8)), hooked], ids=["subclass", "hook"])
def test_09_linear_whose_output_is_changed_by_its_own_forward_or_a_hook(make):
    base = built(make)
    assert merging_moves(theirs(base, target_modules=["inner"]), X) > EFFECT
    ours_is_right(base, rules("inner"), X)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_09_linear_whose_weight_is_computed(norm):
    base, other = (built(lambda: Around(norm(nn.Linear(8, 8)))) for _ in range(2))
    peft_model = peft.get_peft_model(other, peft.LoraConfig(r=4, target_modules=["inner"]))
    jitter_(peft_model)
    assert merging_moves(peft_model.eval(), X) > EFFECT
    with pytest.raises(RefusedError, match=r"inner +its weight is computed"):
        lora_fx.apply(base, rules("inner"))


@pytest.mark.parametrize(
    "settings",
    [{"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular"},
     {"padding": "same", "dilation": 2}],
)  # fmt: skip
def test_10_convolution_with_a_padding_mode_or_dilation(settings):
    base = built(Padded, **settings)
    assert merging_moves(theirs(base, target_modules=["conv"]), *Padded.inputs) > EFFECT
    ours_is_right(base, rules("conv"), *Padded.inputs)


def llama(tie: bool = False) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 50, "num_hidden_layers": 3}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tie)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def test_11_replicated_layers_are_merged_into_each_other(tmp_path):
    base = built(llama)
    peft_model = in_peft(base, tmp_path, r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 3]])
    assert merging_moves(peft_model, IDS) > 1e-3
    with pytest.raises(AdapterFileError) as caught:
        lora_fx.load(base, tmp_path)
    assert caught.value.facts == (("layer_replication", "layer replication: the model has other layers"),)
    # a model that repeats a layer is adapted as it is: its layers are one module, or have weights of their own
    ours_is_right(base, rules("**.q_proj"), IDS)


def test_12_tied_adapters_are_merged_twice(tmp_path):
    base = built(llama, tie=True)
    config = {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    peft_model = in_peft(base, tmp_path, **config)
    adapted = computed(peft_model, (IDS,))
    assert merging_moves(peft_model, IDS) > EFFECT
    read = lora_fx.load(base, tmp_path)
    assert distance(computed(read, (IDS,)), adapted) < OUTPUT
    merged = lora_fx.merge(read)
    assert distance(computed(merged, (IDS,)), adapted) < OUTPUT
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_13_values_that_change_while_merged_do_not_reach_the_base():
    base = built(Lins)
    peft_model = theirs(base, target_modules=["lin0"])
    peft_model.merge_adapter()
    with torch.no_grad():
        peft_model.base_model.model.lin0.lora_B["default"].weight.add_(1)
    peft_model.unmerge_adapter()
    assert distance(peft_model.base_model.model.lin0.base_layer.weight, base.lin0.weight) > EFFECT
    tuned = ours_is_right(base, rules("lin0"), X)
    merged = lora_fx.merge(tuned)  # another model: there is no state to spoil
    before = computed(merged, (X,))
    with torch.no_grad():
        for parameter in lora_fx.parameters(tuned):
            parameter.add_(1)
    assert torch.equal(computed(merged, (X,)), before)
    assert torch.equal(lora_fx.remove(tuned).lin0.weight, base.lin0.weight)
    assert distance(computed(lora_fx.merge(tuned), (X,)), computed(tuned, (X,))) < OUTPUT


def test_14_merging_takes_all_adapters_or_none():
    base = built(Lins)
    peft_model = theirs(base, target_modules=["lin0"])
    peft_model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["lin0"]))
    peft_model.base_model.set_adapter(["default", "other"])
    jitter_(peft_model)
    both = computed(peft_model, (X,))
    peft_model.merge_adapter(["default"])
    assert peft_model.active_adapters == ["default", "other"]
    assert distance(computed(peft_model, (X,)), both) > EFFECT
    two = {
        "version": 1,
        "rules": [
            {"match": {"name": "lin0"}, "lora": {"r": 4}},
            {"match": {"name": "lin1"}, "lora": {"r": 4, "adapter": "other"}},
        ],
    }
    tuned = ours_is_right(base, two, X)
    merged = lora_fx.merge(tuned)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]
    assert not torch.equal(merged.lin0.weight, base.lin0.weight)
    assert not torch.equal(merged.lin1.weight, base.lin1.weight)


@pytest.mark.parametrize("writer", ["peft", "lora_fx"])
def test_15_adapter_of_a_model_with_another_prefix(writer, tmp_path):
    base, outer = built(Lins), built(lambda: Around(Lins()))
    if writer == "peft":
        in_peft(base, tmp_path, r=4, target_modules=["lin0", "lin1"])
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(outer), tmp_path)
        zeros = [not bool(p.any()) for name, p in loaded.named_parameters() if "lora_B" in name]
        assert zeros == [True, True]
    else:
        in_ours(base, tmp_path, rules("*"), (X,))
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(outer, tmp_path)
    assert caught.value.mismatches == (
        ("lin0", "8 → 12", "has no such linear"),
        ("lin1", "12 → 5", "has no such linear"),
    )


def test_16_adapter_of_another_base_with_the_same_shapes(tmp_path):
    base = built(Lins)
    torch.manual_seed(9)
    other = Lins()
    in_ours(base, tmp_path, rules("lin0"), (X,))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path)
    assert distance(computed(loaded, (X,)), computed(other, (X,))) > EFFECT
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(other, tmp_path)
    assert caught.value.mismatches == (
        ("lin0.weight", "trained on other values", "is another base, or was changed since"),
    )
    lora_fx.load(base, tmp_path)


def test_17_embedding_with_a_greatest_norm():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(50, 8, max_norm=1.0), nn.Linear(8, 5)

        def forward(self, ids):
            return self.out(self.words(ids))

    base = built(Normed)
    assert merging_moves(theirs(base, target_modules=["words"]), IDS) > EFFECT
    with pytest.raises(RefusedError, match=r"words +max_norm rescales the rows that are looked up"):
        lora_fx.apply(base, rules("words"))
