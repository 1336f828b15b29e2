"""An adapter for each row of a batch: every row gives what it gives alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from tests.support.twoadapters import BACKENDS, BOTH, DORA, WIDE, alone, two

MIXED = ["b", None, "a", "a"]


def batch(rows: int = 4, tokens: int = 5) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(2))


def one_by_one(tuned: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(x[number : number + 1]))
    return torch.cat(results)


@BACKENDS
@pytest.mark.parametrize("names", [MIXED, ["a", "a", "b", "b"], ["a"] * 4, [None] * 4, ["b", "a", "b", None]])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.sampled(2)
def test_each_row_gives_what_it_gives_alone(inputs, names, training):
    tuned = two(inputs).train(training)
    with lora_fx.rows(tuned, names):
        together = tuned(batch())
        with torch.no_grad():
            without_gradients = tuned(batch())
    assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)
    assert_close(without_gradients, together, atol=1e-6, rtol=1e-6)


@BACKENDS
@pytest.mark.parametrize("name", ["train", "training", "forward"])
def test_rows_take_names_that_modules_have_for_something_else(inputs, name):
    tuned = two(inputs)
    lora_fx.rename(tuned, "a", name)
    names = ["b", None, name, name]
    with lora_fx.rows(tuned, names):
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)


@BACKENDS
def test_gradients_reach_each_adapter_from_its_own_rows(inputs):
    tuned = two(inputs)
    x = batch()

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        tuned.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}

    with lora_fx.rows(tuned, MIXED):
        together = gradients(tuned(x).square().mean((1, 2)).sum())
    apart = gradients(one_by_one(tuned, MIXED, x).square().mean((1, 2)).sum())
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert_close(gradient, apart[name], atol=1e-6, rtol=1e-5)


class TimeFirst(nn.Module):
    """Its layer sees the batch as the second dimension, as recurrent networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x.transpose(0, 1)).transpose(0, 1)


class Flat(TimeFirst):
    """Its layer sees tokens of all rows below each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x.reshape(-1, 6)).view_as(x)


class FlatTimeFirst(TimeFirst):
    """Its layer sees the first tokens of all rows, then the second ones."""

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x.transpose(0, 1).reshape(-1, 6)).view(x.shape[1], x.shape[0], 6).transpose(0, 1)


class Folded(TimeFirst):
    """Its layer sees windows of each row, as vision models cut them."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, -1)).flatten(0, 1)
        return self.q(windows).unflatten(0, (-1, 2)).flatten(1, 2)


@pytest.mark.parametrize("kind", [TimeFirst, Flat, FlatTimeFirst, Folded], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tokens", [4, 8])
def test_the_batch_is_found_wherever_a_layer_sees_it(kind, tokens):
    rules = {"version": 1, "rules": [{"match": {"name": "q"}, "lora": {"r": 2, "init": "random"}}]}
    torch.manual_seed(0)
    tuned = lora_fx.apply(kind(), rules, backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, rules, adapter="b")
    with lora_fx.rows(tuned, MIXED):
        together = tuned(batch(tokens=tokens))
    assert_close(together, one_by_one(tuned, MIXED, batch(tokens=tokens)), atol=1e-6, rtol=1e-6)


class OtherSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.filters = nn.Embedding(11, 6), nn.Conv1d(6, 4, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.filters(self.words(ids).transpose(1, 2))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_embeddings_and_convolutions_take_rows_too(training):
    rules = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2, "init": "random"}}]}
    torch.manual_seed(0)
    tuned = lora_fx.apply(OtherSites(), rules, backend="modules").train(training)
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, rules, adapter="b")
    ids = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    with lora_fx.rows(tuned, MIXED):
        together = tuned(ids)
    expected = one_by_one(tuned, MIXED, ids)
    largest = float(expected.detach().abs().max())  # sums of such numbers are cancelled
    assert_close(together, expected, atol=1e-6 * largest, rtol=1e-6)


def test_dora_slices_and_other_ranks_stand_side_by_side():
    tuned = alone(BOTH, "a")
    sliced = {
        "match": {"name": "**.q"},
        "lora": {"r": 1, "init": "random"},
        "slices": {"of": ["x", "y"], "adapt": ["y"]},
    }
    lora_fx.add(tuned, DORA, adapter="dora")
    lora_fx.add(tuned, {"version": 1, "rules": [sliced]}, adapter="sliced")
    names = ["dora", "default", "sliced", None]
    with lora_fx.rows(tuned, names):
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, names, batch()), atol=1e-6, rtol=1e-6)


def test_identical_rows_are_told_apart():
    tuned = two()
    same = batch(1).expand(4, -1, -1)
    with lora_fx.rows(tuned, MIXED):
        together = tuned(same)
    assert_close(together, one_by_one(tuned, MIXED, same), atol=1e-6, rtol=1e-6)


def test_only_the_first_call_runs_the_base_beside():
    tuned, calls = two(), []
    tuned.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with lora_fx.rows(tuned, MIXED):
        tuned(batch())
        assert len(calls) == 4 + 4 + 1  # the rows are four, so that two bits tell them apart
        tuned(batch(tokens=9))
    with lora_fx.rows(tuned, ["a", "b"]):
        tuned(batch(2))
    assert len(calls) == 11


def test_other_threads_and_later_calls_have_what_they_had():
    tuned = two()
    expected = tuned(batch())
    seen: list[Tensor] = []
    with lora_fx.rows(tuned, MIXED):
        other = threading.Thread(target=lambda: seen.append(tuned(batch())))
        other.start()
        other.join()
    assert torch.equal(seen[0], expected)
    assert torch.equal(tuned(batch()), expected)
    assert not tuned._forward_pre_hooks


def test_rows_that_are_not_the_batchs_are_refused():
    tuned = two()
    with lora_fx.rows(tuned, ["a", "b"]), pytest.raises(lora_fx.RefusedError, match=r"for 2 rows.*\n.*\[4, 5, 6\]"):
        tuned(batch())


def test_a_call_of_a_part_whose_rows_nobody_has_seen_is_refused():
    tuned = two()
    with lora_fx.rows(tuned, MIXED), pytest.raises(lora_fx.RefusedError, match="call the adapted model itself"):
        tuned.blocks[0](batch())


class Shared(nn.Module):
    """Its layer sees something that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.places = nn.Linear(6, 6), nn.Parameter(torch.randn(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.q(self.places)


def test_what_all_rows_share_cannot_have_an_adapter_for_each():
    rules: dict[str, Any] = {"version": 1, "rules": [{"match": {"name": "q"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(Shared(), rules, backend="modules")
    with lora_fx.rows(tuned, ["default", None]), pytest.raises(lora_fx.RefusedError, match=r"cannot be seen\n +q "):
        tuned(batch(2))


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_that_code_reads_has_one_adapter_for_all_rows():
    rules: dict[str, Any] = {"version": 1, "rules": [{"match": {"name": "weight"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(
        nn.Sequential(Read()), {**rules, "rules": [{"match": {"name": "0.weight"}, "lora": {"r": 2}}]}, (batch(),)
    )
    with pytest.raises(lora_fx.RefusedError, match="code reads"), lora_fx.rows(tuned, ["default", None]):
        pass


@pytest.mark.parametrize(
    ("names", "message"), [(["a", "c"], "no adapter is called 'c'"), ("ab", "a sequence"), ([], "a sequence")]
)
def test_names_that_cannot_be_are_refused(names, message):
    with pytest.raises(ValueError, match=message), lora_fx.rows(two(), names):
        pass


def test_generation_with_a_cache_gives_each_prompt_what_it_gives_alone():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    rules = {
        "version": 1,
        "rules": [{"match": {"name": "**.{q,v,down}_proj"}, "lora": {"r": 4, "alpha": 64, "init": "random"}}],
    }
    ids = torch.randint(1, 60, (3, 6), generator=torch.Generator().manual_seed(0))
    tuned = lora_fx.apply(base, rules, {"input_ids": ids})
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, rules, adapter="b")
    names = ["a", None, "b"]
    options = {"max_new_tokens": 8, "do_sample": False}
    with lora_fx.rows(tuned, names):
        together = tuned.generate(ids, **options)
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            assert torch.equal(tuned.generate(ids[number : number + 1], **options)[0], together[number])
    assert len({tuple(row[6:].tolist()) for row in together}) == 3


def test_prompts_of_one_equal_token_are_told_apart():
    tuned = lora_fx.apply(
        OtherSites(),
        {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2, "init": "random"}}]},
        backend="modules",
    )
    ids = torch.full((3, 1), 7)
    names = ["default", None, "default"]
    with lora_fx.rows(tuned, names):
        together = tuned(ids)
    assert_close(together, one_by_one(tuned, names, ids), atol=1e-6, rtol=1e-6)


def test_values_that_change_between_calls_count():
    tuned = two()
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        tuned(batch())
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_B.a.weight"):
                parameter.mul_(-3)
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-6, rtol=1e-6)
    lora_fx.drop(tuned, "a")
    lora_fx.add(tuned, WIDE, adapter="a")
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-6, rtol=1e-6)


ALL_Q = {"version": 1, "rules": [{"match": {"name": "q"}, "lora": {"r": 2, "init": "random"}}]}


def with_b(model: nn.Module) -> nn.Module:
    tuned = lora_fx.apply(model, ALL_Q, backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, ALL_Q, adapter="b")
    return tuned


def test_a_first_call_of_one_token_says_nothing_of_the_order_of_several():
    tuned = with_b(FlatTimeFirst())
    with lora_fx.rows(tuned, MIXED):
        tuned(batch(tokens=1))
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-6, rtol=1e-6)


class Turned(TimeFirst):
    """An argument says where its layer has the batch."""

    def forward(self, x: Tensor, time_first: bool = False) -> Tensor:  # type: ignore[override]
        return super().forward(x) if time_first else self.q(x)


def test_a_layer_that_has_the_batch_in_two_places_is_refused():
    tuned = with_b(Turned())
    with lora_fx.rows(tuned, MIXED):
        tuned(batch(tokens=4), False)
        with pytest.raises(lora_fx.RefusedError, match="cannot be seen"):
            tuned(batch(tokens=4), True)


class Placed(TimeFirst):
    def forward(self, x: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        return self.q(x + places[None, :, None])


def test_another_input_that_has_as_many_entries_as_there_are_names_is_not_the_batch():
    tuned = with_b(Placed())
    with lora_fx.rows(tuned, ["a", "b"]):
        tuned(batch(2), torch.arange(5.0))
        with pytest.raises(lora_fx.RefusedError, match="cannot be seen"):
            tuned(batch(4, tokens=2), torch.arange(2.0))


def test_values_written_past_their_version_count_in_the_next_context():
    tuned = two()
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        tuned(batch())
    for name, parameter in tuned.named_parameters():
        if "lora" in name:
            parameter.data.mul_(-3)
    with lora_fx.rows(tuned, MIXED), torch.no_grad():
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_takes_rows():
    tuned = two()
    compiled = torch.compile(tuned, backend="eager")
    with lora_fx.rows(compiled, MIXED):
        together = compiled(batch())
    assert_close(together, one_by_one(tuned, MIXED, batch()), atol=1e-6, rtol=1e-6)


def test_layers_of_an_adapter_that_is_added_are_looked_at_too():
    tuned = two().eval()
    with lora_fx.rows(tuned, MIXED):
        tuned(batch())
    rules = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2, "init": "random"}}]}
    lora_fx.add(tuned, rules, adapter="c")
    names = ["c", None, "a", "c"]
    with lora_fx.rows(tuned, names):
        together = tuned(batch())
    assert_close(together, one_by_one(tuned, names, batch()), atol=1e-4, rtol=1e-4)
