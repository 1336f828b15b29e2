"""Slices: some parts of a fused weight are adapted, each with r ranks of its own; all other rows have no delta at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2Model
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.models.samples import Sample
from tests.support.compoundkinds import Attention, Mixture
from tests.support.sitekinds import (
    BACKENDS,
    RANK,
    SCALING,
    factors,
    factors_of,
    flat,
    randomise_,
    relative,
    run,
    same_values,
)


@dataclass(frozen=True)
class Sliced:
    """A weight with parts; the rows of those that are adapted, written out."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    weight: str
    layout: str
    slices: dict[str, Any]
    rows: list[list[int]]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def sample(self, dtype: torch.dtype = torch.float32) -> Sample:
        torch.manual_seed(1)
        args = (argument.to(dtype) if argument.is_floating_point() else argument for argument in self.inputs())
        return lora_fx.call(*args)

    def rules(self, dropout: float = 0.0, **more: Any) -> dict[str, Any]:
        rule = {"match": {"name": self.weight.removesuffix(".weight")}, "slices": self.slices}
        rule["lora"] = {"r": RANK, "alpha": RANK * SCALING, "dropout": dropout}
        return {"version": 1, "rules": [rule | more]}

    def trained(self, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
        tuned = lora_fx.apply(self.build(dtype), self.rules(dropout), self.sample(dtype), backend=backend)
        randomise_(tuned)
        return tuned

    def delta(self, A: Tensor, B: Tensor, stored: torch.Size) -> Tensor:
        """Return ΔW from A [parts · r, in] and B [rows of all parts, r] (banks: one of each for every expert)."""
        bank = A.shape[:-2]
        rows = stored[-1] if self.layout == "in_out" else stored[-2]
        whole = torch.zeros(*bank, rows, A.shape[-1], dtype=A.dtype)
        done = 0
        for number, part in enumerate(self.rows):
            block = B[..., done : done + len(part), :] @ A[..., number * RANK : (number + 1) * RANK, :]
            whole = whole.index_add(len(bank), torch.tensor(part), SCALING * block)
            done += len(part)
        return whole.transpose(-1, -2) if self.layout == "in_out" else whole

    def reference(self, tuned: nn.Module, dtype: torch.dtype) -> Tensor:
        A, B = factors_of(tuned, self.weight)
        model = self.build(dtype).requires_grad_(False)
        weight = dict(model.named_parameters())[self.weight]
        result = functional_call(model, {self.weight: weight + self.delta(A, B, weight.shape)}, self.sample(dtype).args)
        return flat(result)


class Grouped(nn.Module):
    """Grouped-query attention: 4 heads of queries, one of keys, one of values, in one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([16, 4, 4], -1)
        q = q.unflatten(-1, (4, 4)).transpose(1, 2)
        return (
            F.scaled_dot_product_attention(q, k[:, None].expand_as(q), v[:, None].expand_as(q))
            .transpose(1, 2)
            .flatten(2)
        )


class RawFused(nn.Module):
    """A raw [in, out] parameter that is cut into parts before it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x @ part for part in self.w.chunk(3, dim=1)]


def tokens() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8),)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=19, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    return GPT2Model(config)


QKV = {"of": ["q", "k", "v"], "adapt": ["q", "v"]}
UNEQUAL = {"of": {"q": 16, "k": 4, "v": 4}, "adapt": ["k", "v"]}
FALCON = {
    "of": {"q": ["0..4", "8..12"], "k": ["4..6", "12..14"], "v": ["6..8", "14..16"]},
    "adapt": ["v", "q"],
}
"""Two groups, each with its queries, keys and values in a row."""
FALCON_ROWS = [[0, 1, 2, 3, 8, 9, 10, 11], [6, 7, 14, 15]]


def run_of(*ends: int) -> list[list[int]]:
    return [list(range(a, b)) for a, b in zip(ends[::2], ends[1::2], strict=True)]


SLICED = [
    Sliced("equal parts", lambda: nn.Sequential(nn.Linear(8, 12)), tokens, "0.weight", "out_in", QKV, run_of(0, 4, 8, 12)),
    Sliced("one part", lambda: nn.Sequential(nn.Linear(8, 12)), tokens, "0.weight", "out_in",
           {"of": ["q", "k", "v"], "adapt": ["k"]}, run_of(4, 8)),
    Sliced("grouped queries", Grouped, tokens, "qkv.weight", "out_in", UNEQUAL, run_of(16, 20, 20, 24)),
    Sliced("interleaved", lambda: nn.Sequential(nn.Linear(8, 16)), tokens, "0.weight", "out_in", FALCON, FALCON_ROWS),
    Sliced("Conv1D of transformers", lambda: nn.Sequential(Conv1D(12, 8)), tokens, "0.weight", "in_out", QKV, run_of(0, 4, 8, 12)),
    Sliced("GPT-2", gpt2, lambda: (torch.randint(0, 19, (2, 5)),), "h.0.attn.c_attn.weight", "in_out", QKV, run_of(0, 8, 16, 24)),
    Sliced("nn.MultiheadAttention", lambda: Attention(True, {"need_weights": False}, batch_first=True),
           lambda: tokens() * 3, "attention.in_proj_weight", "out_in", QKV, run_of(0, 8, 16, 24)),
    Sliced("bank of experts", Mixture, lambda: (torch.randn(7, 6),), "experts.gate_up_proj", "out_in",
           {"of": ["gate", "up"], "adapt": ["up"]}, run_of(4, 8)),
    Sliced("bank of experts, both", Mixture, lambda: (torch.randn(7, 6),), "experts.gate_up_proj", "out_in",
           {"of": ["gate", "up"], "adapt": ["gate", "up"]}, run_of(0, 4, 4, 8)),
    Sliced("raw parameter", RawFused, tokens, "w", "in_out", QKV, run_of(0, 4, 8, 12)),
]  # fmt: skip
every_kind = pytest.mark.parametrize("sliced", SLICED, ids=lambda sliced: sliced.name)
both = pytest.mark.parametrize("backend", BACKENDS)


@every_kind
@both
def test_sliced_model_starts_bit_equal_to_its_base(sliced: Sliced, backend: str):
    tuned = lora_fx.apply(sliced.build(), sliced.rules(dropout=0.2), sliced.sample(), backend=backend)
    base, sample = sliced.build().requires_grad_(False), sliced.sample()
    for training in (False, True):
        for grad in (False, True):
            assert torch.equal(run(tuned, sample, training, grad), run(base, sample, training, grad))


@every_kind
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@both
@pytest.mark.sampled(2)
def test_output_and_gradients_are_those_of_the_dense_weight(
    sliced: Sliced, backend: str, dtype: torch.dtype, allowed: float
):
    tuned = sliced.trained(backend, dtype)
    result, expected = run(tuned, sliced.sample(dtype), grad=True), sliced.reference(tuned, dtype)
    assert relative(result, expected) <= allowed
    assert relative(expected, run(sliced.build(dtype), sliced.sample(dtype))) > 1e-3
    loss = torch.arange(result.numel(), dtype=dtype).cos()
    ours, theirs = (
        torch.autograd.grad((output * loss).sum(), list(factors(tuned).values())) for output in (result, expected)
    )
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 0
        assert relative(gradient, wanted) <= 5 * allowed


@every_kind
def test_rows_outside_of_the_adapted_parts_stay_as_they_are_to_the_bit(sliced: Sliced):
    tuned = sliced.trained()
    before, after = (dict(model.named_parameters())[sliced.weight] for model in (sliced.build(), lora_fx.merge(tuned)))
    changed = (after != before).any(-1 if sliced.layout == "out_in" else -2)
    adapted = torch.zeros(changed.shape[-1], dtype=torch.bool)
    adapted[[row for part in sliced.rows for row in part]] = True
    assert torch.equal(changed, adapted.expand_as(changed))
    A, B = factors_of(tuned, sliced.weight)
    assert relative(after - before, sliced.delta(A, B, before.shape)) <= 1e-5


@every_kind
def test_factors_hold_nothing_for_the_other_rows(sliced: Sliced):
    tuned = sliced.trained()
    plan = lora_fx.plan(sliced.build(), sliced.rules(), sliced.sample())
    A, B = factors_of(tuned, sliced.weight)
    assert A.shape[-2] == RANK * len(sliced.rows)
    assert B.shape[-2:] == (sum(map(len, sliced.rows)), RANK)
    assert plan.trainable == A.numel() + B.numel()


@every_kind
def test_saving_removing_and_merging_are_exact(sliced: Sliced, tmp_path):
    tuned, sample = sliced.trained("auto", dropout=0.2), sliced.sample()
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(sliced.build(), tmp_path, sample)
    assert same_values(tuned, loaded)
    for training in (False, True):
        assert torch.equal(run(loaded, sample, training), run(tuned, sample, training))
    assert same_values(lora_fx.remove(tuned), sliced.build())
    assert relative(run(lora_fx.merge(tuned), sample), run(tuned, sample)) <= 1e-5


def refused(model: nn.Module, slices: dict[str, Any], name: str = "0", given: tuple[Any, ...] | None = None) -> str:
    rules = {"version": 1, "rules": [{"match": {"name": name}, "slices": slices, "lora": {"r": 2}}]}
    plan = lora_fx.plan(model, rules, given)
    assert plan.adapted == ()
    with pytest.raises(lora_fx.RefusedError, match=name):
        lora_fx.apply(model, rules, given)
    return plan.refused[0].reason


def test_parts_of_the_wrong_size_are_refused_with_the_numbers():
    reason = refused(nn.Sequential(nn.Linear(8, 12)), {"of": {"q": 8, "k": 2, "v": 4}, "adapt": ["q"]})
    assert reason == "the slices have 14 rows together, the weight has 12"


def test_parts_that_cannot_be_equal_are_refused_with_the_numbers():
    assert refused(nn.Sequential(nn.Linear(8, 13)), QKV) == "13 rows cannot be cut into 3 equal parts"


def test_row_ranges_beyond_the_weight_are_refused_with_the_numbers():
    assert refused(nn.Sequential(nn.Linear(8, 12)), FALCON) == "the slices name rows up to 16, the weight has 12"


def test_slices_of_a_convolution_are_refused():
    assert "not for conv2d" in refused(nn.Sequential(nn.Conv2d(3, 12, 3)), QKV)


def test_slices_of_an_embedding_are_refused():
    assert "not for embedding" in refused(nn.Sequential(nn.Embedding(9, 12)), QKV)


def test_one_rule_may_slice_some_sites_and_be_refused_at_others():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 13))
    rules = {"version": 1, "rules": [{"match": {"op": "linear"}, "slices": QKV, "lora": {"r": 2}}]}
    plan = lora_fx.plan(model, rules)
    assert [site.path for site in plan.adapted] == ["0"]
    assert [site.path for site in plan.refused] == ["1"]
