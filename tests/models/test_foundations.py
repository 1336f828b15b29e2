"""The small parts that everything stands on: text, swapped classes, twins, samples, tensors, private torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_fx.adapters.lora import folded_weight, low_rank_weight
from lora_fx.capture.calls.ambient import in_clean_thread
from lora_fx.models import torch_internals
from lora_fx.models.samples import call, samples_of
from lora_fx.models.swap import Swapped, original_class, swap, swapped_class, unswap
from lora_fx.models.tensors import borrowed, get_tensor, own_parameters, set_tensor
from lora_fx.models.twin import make_twin, shares_storage
from lora_fx.text import caret, columns, count, listing, nearest
from tests.support import zoo

# -- text


def test_columns_are_aligned_without_trailing_blanks():
    assert columns([("a", "bb", ""), ("ccc", "d", "e")]) == "  a    bb\n  ccc  d   e"


def test_caret_stands_under_the_word_also_behind_tabs():
    assert caret("\ta: b", 3, 5, 1) == "    3 | \ta: b\n      | \t   ^"


def test_caret_does_not_run_over_the_end_of_the_line():
    assert caret("ab", 1, 2, 99).endswith("| " + " ^")


def test_caret_stands_under_the_word_also_behind_wide_characters_and_accents():
    shown, marks = caret('{n: "日本e\u0301", m: 3}', 3, 13, 1).splitlines()
    assert shown == '    3 | {n: "日本e\u0301", m: 3}'
    assert marks == "      | " + " " * 13 + "^"


def test_caret_shows_the_surroundings_of_its_column_in_a_long_line():
    shown, marks = caret("a" * 500 + "WRONG" + "b" * 500, 3, 501, 5).splitlines()
    assert shown == "    3 | …" + "a" * 49 + "WRONG" + "b" * 46 + "…"
    assert marks == "      | " + " " * 50 + "^^^^^"


def test_words():
    assert (count(1, "site"), count(1200, "site")) == ("1 site", "1,200 sites")
    assert listing("abc", most=2) == "a, b … and 1 more"
    assert nearest("alhpa", ["alpha", "r"]) == ("alpha",)


# -- swapped classes


class Doubling(Swapped, nn.Module):
    def forward(self, *args):
        return 2 * super().forward(*args)


class Reduced(nn.Linear):
    """A class that pickles in a way of its own."""

    def __reduce_ex__(self, protocol):
        return (Reduced, (self.in_features, self.out_features), self.__dict__)


@pytest.mark.parametrize("make", [lambda: nn.Linear(2, 2), lambda: Reduced(2, 2)])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_swapped_module_keeps_class_name_and_survives_copies(make, duplicate):
    module = make()
    x, original = torch.randn(3, 2), type(module)
    expected = 2 * module(x)
    swap(module, Doubling)
    other = duplicate(module)
    for each in (module, other):
        assert torch.equal(each(x), expected)
        assert isinstance(each, original)
        assert type(each).__name__ == original.__name__
        assert original_class(each) is original
    assert type(other) is type(module) is swapped_class(original, Doubling)
    unswap(module)
    assert type(module) is original


# -- twins


def test_twin_shares_memory_keeps_ties_and_is_frozen():
    model = zoo.Gpt()
    twin = make_twin(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert shares_storage(twin.get_parameter(name), parameter)
        assert twin.get_parameter(name) is not parameter
    assert twin.lm_head.weight is twin.wte.weight
    assert not any(p.requires_grad for p in twin.parameters())


def test_twin_keeps_attributes_that_parameters_carry():
    model = zoo.Mlp()
    model.fc1.weight.tensor_parallel = "column"
    assert make_twin(model).fc1.weight.tensor_parallel == "column"


def test_twin_of_a_model_with_computed_weights_is_possible():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    assert torch.equal(make_twin(model)(x), model(x))


# -- tensors by name


def test_tensors_can_be_set_owned_and_borrowed_by_name():
    model = zoo.Gpt()
    own_parameters(model, ["lm_head.weight"], requires_grad=True)
    assert model.lm_head.weight is not model.wte.weight
    other = torch.zeros_like(model.wte.weight)
    before = get_tensor(model, "wte.weight")
    with borrowed(model, {"wte.weight": other}):
        assert not model.wte.weight.any()
    assert get_tensor(model, "wte.weight") is before
    set_tensor(model, "wte.weight", nn.Parameter(other))
    assert not model.wte.weight.any()
    with pytest.raises(KeyError):
        get_tensor(model, "wte.nothing")


# -- samples


def test_all_forms_of_inputs_mean_samples():
    x = torch.zeros(1)
    assert samples_of((x,))[0].args == (x,)
    assert samples_of({"x": x})[0].kwargs == {"x": x}
    assert samples_of(call(x, y=1))[0] == call(x, y=1)
    assert len(samples_of([(x,), {"x": x}])) == 2


# -- the formula


def test_merged_weight_is_accumulated_in_float32_and_rounded_once():
    torch.manual_seed(0)
    weight = torch.randn(64, 32, dtype=torch.bfloat16)
    A, B = torch.randn(8, 32), torch.randn(64, 8) * 0.01
    exact = weight.double() + 2.0 * (B.double() @ A.double())
    merged = folded_weight(weight, low_rank_weight(A, B, 2.0))
    assert merged.dtype == torch.bfloat16
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((merged.double() - exact).abs() <= 0.5 * ulp + 1e-6).all()


def test_float64_stays_float64():
    A, B = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert torch.equal(low_rank_weight(A, B, 0.5), 0.5 * (B @ A))


# -- threads and private torch


def test_clean_thread_sees_no_modes_returns_results_and_raises_errors():
    with torch.no_grad():
        assert in_clean_thread(torch.is_grad_enabled) is True
    with pytest.raises(ZeroDivisionError):
        in_clean_thread(lambda: 1 / 0)
    threads = torch.get_num_threads()
    assert in_clean_thread(torch.get_num_threads) == threads


def test_private_torch_still_behaves_as_we_rely_on():
    fakes = torch_internals.Fakes()
    fake = fakes.tensor(torch.zeros(2, 5, 8), "x", [False, False, False])
    weight = nn.Parameter(torch.zeros(8, 8))
    with fakes.active():
        out = nn.functional.linear(fake, weight)
        wide = fake.shape[1] > 4
    assert isinstance(out, torch_internals.FakeTensor)
    assert wide
    sizes = [size for size in fake.shape if isinstance(size, torch.SymInt)]
    guards = fakes.guards(sizes, ["a", "b", "c"][: len(sizes)])
    assert "2 <= a" in guards
    assert "5 <= b" in guards
    assert "c == 8" in guards
    assert torch_internals.constant_of(fake.shape[2]) == 8
    assert all(isinstance(table, dict) for table in torch_internals.global_hook_tables())
