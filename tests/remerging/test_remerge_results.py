"""remerge: how results are computed and rounded, what is warned of, and what is an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import passes
from lora_fx.errors import InvariantError, LoraFxWarning, MergeError
from lora_fx.remerging.graph import Remerge
from lora_fx.remerging.whole import remerged
from tests.support import foreign
from tests.support.foreign import between, randomised
from tests.support.remerged import X, assert_equal, names

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
