"""Rows of an embedding that are trained alone: what the model computes, learns, merges, and gives back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from tests.support.wordmodels import BACKENDS, IDS, WORDS, by_hand, fill, model, rows_in, rules, trained

TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])


def values(tuned: nn.Module, adapter: str = "default") -> dict[int, Tensor]:
    (rows,) = rows_in(tuned, adapter).values()
    return dict(zip(IDS, rows.detach().clone(), strict=True))


@BACKENDS
@TIED
def test_fresh_rows_are_those_of_the_base_bit_by_bit(inputs, tied):
    given = {**rules(), "rules": [{"match": {"name": "**.{q,k}"}, "lora": {"r": 2}}]}
    tuned = trained(inputs, tied, given)
    with torch.no_grad():
        for rows in rows_in(tuned).values():
            rows.copy_(model(tied).words.weight[IDS])
    assert torch.equal(tuned.words(WORDS), model(tied).words(WORDS))
    assert torch.equal(tuned(WORDS), model(tied)(WORDS))


@BACKENDS
@TIED
def test_model_computes_what_it_would_with_the_rows_in_its_weight(inputs, tied):
    tuned = trained(inputs, tied)
    expected = by_hand(tuned, values(tuned), tied)
    assert torch.equal(tuned.words(WORDS), expected.words(WORDS))
    torch.testing.assert_close(tuned(WORDS), expected(WORDS))


@BACKENDS
@TIED
def test_gradients_are_those_of_the_rows_of_the_whole_weight(inputs, tied):
    tuned = trained(inputs, tied)
    whole = by_hand(tuned, values(tuned), tied)
    whole.words.weight.requires_grad_()
    whole.head.weight.requires_grad_(tied)
    for each in (tuned, whole):
        each(WORDS).square().sum().backward()
    (rows,) = rows_in(tuned).values()
    torch.testing.assert_close(rows.grad, whole.words.weight.grad[IDS], rtol=1e-4, atol=1e-4)
    assert tuned.get_parameter("words.weight").grad is None
    for name, parameter in tuned.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def test_tied_head_has_the_same_rows_and_they_count_once():
    tuned = trained()
    assert [parameter.shape for parameter in rows_in(tuned).values()] == [(3, 6)]
    rows = next(iter(rows_in(tuned).values()))
    assert sum(parameter is rows for parameter in lora_fx.parameters(tuned)) == 1
    plan = lora_fx.plan(model(), rules())
    assert plan.trainable == sum(site.trainable for site in plan.sites) + 3 * 6
    assert "train 3 rows of words.weight, 18 parameters" in str(plan)
    assert "train 3 rows of head.weight: those of words.weight, to which it is tied" in str(plan)
    assert lora_fx.inspect(tuned).trained == ("words.weight, 3 rows", "head.weight, 3 rows")
    assert torch.equal(tuned.head.weight, tuned.words.weight)


def test_base_keys_and_the_callers_model_stay():
    caller = model()
    before = {name: tensor.clone() for name, tensor in caller.state_dict().items()}
    tuned = lora_fx.apply(caller, rules(), backend="modules")
    fill(tuned)
    tuned(WORDS).sum().backward()
    assert [name for name in tuned.state_dict() if "lora" not in name] == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in caller.state_dict().items())
    assert tuned.state_dict()["words.weight"].data_ptr() == caller.words.weight.data_ptr()
    assert type(tuned.words).__name__ == "Embedding"
    assert isinstance(tuned.words, nn.Embedding)


@BACKENDS
def test_base_comes_back_for_a_while_and_for_good(inputs):
    tuned, base = trained(inputs), model()(WORDS)
    now = tuned(WORDS)
    for without in (lora_fx.disabled(tuned), lora_fx.use(tuned, None)):
        with without:
            assert torch.equal(tuned(WORDS), base)
    assert torch.equal(tuned(WORDS), now)
    removed = lora_fx.remove(tuned)
    assert torch.equal(removed(WORDS), base)
    assert removed.head.weight is removed.words.weight
    assert [type(part) for part in removed.modules()] == [type(part) for part in model().modules()]


@TIED
def test_merged_model_has_the_rows_in_its_weight_and_stays_tied(tied):
    tuned = trained(tied=tied)
    merged = lora_fx.merge(tuned)
    torch.testing.assert_close(merged(WORDS), tuned(WORDS))
    expected = model(tied).words.weight.detach().clone()
    for row, value in values(tuned).items():
        expected[row] = value
    assert torch.equal(merged.words.weight, expected)
    assert (merged.head.weight is merged.words.weight) == tied
    assert list(merged.state_dict()) == list(model(tied).state_dict())
    assert [type(part) for part in merged.modules()] == [type(part) for part in model().modules()]


def test_half_of_an_adapter_is_half_way_to_its_rows():
    tuned, base = trained(), model().words.weight
    with lora_fx.use(tuned, {"default": 0.5}):
        halfway = {row: (base[row] + value) / 2 for row, value in values(tuned).items()}
        for row, value in halfway.items():
            torch.testing.assert_close(tuned.words.weight[row], value)
            torch.testing.assert_close(tuned.words(torch.tensor(row)), value)
        merged = lora_fx.merge(tuned)
        torch.testing.assert_close(merged(WORDS), tuned(WORDS))


def two(inputs: Any = None) -> Any:
    tuned = trained(inputs)
    lora_fx.add(tuned, rules([7, 2, 0], adapter="b"))
    fill(tuned, "b", 6)
    return tuned


@BACKENDS
def test_each_adapter_has_rows_of_its_own(inputs):
    tuned = two(inputs)
    one, other = (
        values(tuned),
        dict(zip([0, 2, 7], rows_in(tuned, "b")["words.lora_trained.b.weight.rows"], strict=True)),
    )
    base = model().words.weight.detach()
    for chosen, expected in (("default", one), ("b", other), (None, {}), ("default", one)):
        lora_fx.use(tuned, chosen)
        for row in range(20):
            value = expected.get(row, base[row])
            assert torch.equal(tuned.words(torch.tensor(row)), value)
            assert torch.equal(tuned.head.weight[row], value)
    lora_fx.use(tuned, ["default", "b"])
    both = {**one, **other, 7: one[7] + other[7] - base[7]}
    for row in range(20):
        torch.testing.assert_close(tuned.words(torch.tensor(row)), both.get(row, base[row]))
    torch.testing.assert_close(lora_fx.merge(tuned)(WORDS), tuned(WORDS))


def test_training_one_adapter_moves_no_row_of_the_other():
    tuned = two()
    lora_fx.use(tuned, "b")
    tuned(WORDS).square().sum().backward()
    moved = {name for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    assert "words.lora_trained.b.weight.rows" in moved
    assert all(".b." in name for name in moved)
    assert {id(p) for p in lora_fx.parameters(tuned, "b")} >= {id(p) for p in rows_in(tuned, "b").values()}
    assert not {id(p) for p in lora_fx.parameters(tuned, "b")} & {id(p) for p in rows_in(tuned).values()}


def test_adapters_with_rows_are_renamed_dropped_and_frozen():
    tuned = two()
    lora_fx.use(tuned, "b")
    expected = tuned(WORDS)
    lora_fx.rename(tuned, "b", "c")
    assert torch.equal(tuned(WORDS), expected)
    lora_fx.drop(tuned, "default")
    assert torch.equal(tuned(WORDS), expected)
    assert not any(".default." in name for name in tuned.state_dict())
    lora_fx.add(tuned, rules(adapter="d"), trainable=False)
    assert not any(parameter.requires_grad for parameter in rows_in(tuned, "d").values())
    lora_fx.drop(tuned, "c")
    lora_fx.use(tuned, "d")
    assert torch.equal(tuned.words(WORDS), model().words(WORDS))


def test_copies_and_pickles_have_rows_of_their_own():
    tuned = two()
    lora_fx.use(tuned, "b")
    twins, expected = [copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))], tuned(WORDS)
    fill(tuned, "b", 9)
    for twin in twins:
        assert torch.equal(twin(WORDS), expected)
        assert len(rows_in(twin, "b")) == 1


def test_checkpoint_has_the_rows_once():
    tuned = two()
    state = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(tuned).items()}
    assert [name for name in state if "rows" in name] == [
        "words.lora_trained.default.weight.rows",
        "words.lora_trained.b.weight.rows",
    ]
    fresh = two()
    fill(fresh, "b", 9)
    lora_fx.load_adapter_state(fresh, state)
    for each in (tuned, fresh):
        lora_fx.use(each, "b")
    assert torch.equal(fresh(WORDS), tuned(WORDS))


def test_rows_of_a_half_precision_base_are_trained_in_float32():
    caller = model().bfloat16()
    tuned = lora_fx.apply(caller, rules(), backend="modules")
    assert [parameter.dtype for parameter in rows_in(tuned).values()] == [torch.float32]
    assert torch.equal(tuned.words(WORDS), caller.words(WORDS))
    assert tuned.head.weight.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert trained()(WORDS).dtype is torch.bfloat16


def test_moved_model_has_its_rows_where_it_is():
    tuned = trained()
    expected = by_hand(tuned, values(tuned)).double()
    assert torch.equal(tuned.double().words(WORDS), expected.words(WORDS))
    assert torch.equal(tuned.words.weight, expected.words.weight)
    with torch.device("meta"):
        nowhere = lora_fx.apply(model().to("meta"), rules(), backend="modules")
    assert nowhere(WORDS.to("meta")).shape == (2, 4, 20)


KINDS: dict[str, dict[str, Any]] = {
    "padded": {"padding_idx": 3},
    "of a length": {"max_norm": 0.5},
    "scaled by frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_embedding_does_with_the_rows_what_it_does_with_its_weight(kind):
    tuned = trained(tied=True, **kind)
    whole = copy.deepcopy(model(True, **kind))
    with torch.no_grad():
        for row, value in values(tuned).items():
            whole.words.weight[row] = value
    whole.head.weight = nn.Parameter(whole.words.weight.detach().clone(), requires_grad=False)
    (rows,) = rows_in(tuned).values()
    for each in (tuned.words, whole.words):
        each(WORDS).square().sum().backward()
    expected = whole.words.weight.grad
    expected = expected.to_dense() if expected.is_sparse else expected
    given = rows.grad.to_dense() if rows.grad.is_sparse else rows.grad
    torch.testing.assert_close(given, expected[IDS])
    assert torch.equal(tuned.words(WORDS), whole.words(WORDS))
    torch.testing.assert_close(lora_fx.merge(tuned).words(WORDS), tuned.words(WORDS))


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


def test_class_with_a_forward_of_its_own_runs_it():
    tuned = trained(kind=Scaled)
    assert torch.equal(tuned.words(torch.tensor(3)), values(tuned)[3] * 3.0)


def test_code_that_reads_the_weight_sees_the_rows():
    tuned = trained()
    x = torch.randn(2, 6)
    torch.testing.assert_close(nn.functional.linear(x, tuned.words.weight)[:, 3], x @ values(tuned)[3])
    assert torch.equal(tuned.words.weight[3], values(tuned)[3])
    assert tuned.words.weight.shape == (20, 6)


def test_compiled_code_follows_what_is_used():
    torch.compiler.reset()
    tuned = trained()
    plain = lambda ids: tuned.head(tuned.words(ids))  # noqa: E731
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    expected = plain(WORDS)
    torch.testing.assert_close(compiled(WORDS), expected)
    with lora_fx.use(tuned, None):
        base = plain(WORDS)
        torch.testing.assert_close(compiled(WORDS), base)
    assert not torch.allclose(base, expected)
    torch.testing.assert_close(compiled(WORDS), expected)


def test_a_step_needs_no_product_with_the_gradient_of_the_whole_weight():
    torch.manual_seed(0)
    tuned = trained()
    with FlopCounterMode(display=False) as rows:
        tuned.head(tuned.words(WORDS)).sum().backward()
    tokens, width, vocabulary = WORDS.numel(), 6, 20
    product = 2 * tokens * width
    assert rows.get_total_flops() <= product * (2 * vocabulary + 3 * len(IDS))


def test_no_tensor_of_the_size_of_the_weight_is_made():
    class Sizes(torch.overrides.TorchFunctionMode):
        largest = 0

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.is_floating_point() and not isinstance(result, nn.Parameter):
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    torch.manual_seed(0)
    caller = nn.ModuleDict({"words": nn.Embedding(500, 6), "q": nn.Linear(6, 6)})
    given = {"rules": [{"match": {"name": "q"}, "lora": {"r": 2}}], "tokens": [{"name": "words", "ids": [1]}]}
    tuned: Any = lora_fx.apply(caller, given, backend="modules")
    with Sizes():
        tuned["words"](WORDS).sum().backward()
    assert Sizes.largest <= WORDS.numel() * 6


def test_difference_to_the_base_has_the_rows_as_parameters():
    told = str(lora_fx.diff(model(), trained()))
    assert "@@ words · +18 parameters, +72 B @@" in told
    assert "-120 parameters" not in told


def test_rows_for_rows_of_a_batch_are_refused():
    tuned = two()
    with pytest.raises(lora_fx.RefusedError, match=r"words.weight"), lora_fx.rows(tuned, ["b", None]):
        tuned(WORDS)


def test_combining_refuses_rows_by_name():
    tuned = two()
    with pytest.raises(lora_fx.RefusedError, match=r"words.weight +'default' trains rows of it"):
        lora_fx.combine(tuned, ["default", "b"], adapter="ab")
    assert len(lora_fx.list_adapters(tuned)) == 2


def test_one_of_several_adapters_is_saved_and_exported_with_its_rows_alone(tmp_path):
    tuned = two()
    lora_fx.use(tuned, "b")
    expected = tuned(WORDS)
    lora_fx.export(tuned, tmp_path / "b", target="merged", adapter="b")
    merged = model()
    merged.load_state_dict(_tensors(tmp_path / "b" / "model.safetensors"))
    torch.testing.assert_close(merged(WORDS), expected)


def _tensors(path: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
