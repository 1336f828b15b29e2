"""Dropout masks that follow from a seed: their statistics, with fixed seeds; and what makes them the same or others.

Statistics are in units of their standard error.  Bounds are five of them for some dozens of numbers each: a good
generator would fail with a probability of 6e-7 times their count, and with these seeds it has not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.adapters.fused import masks
from tests.support import zoo

P = (0.5, 0.3, 0.1, 0.05, 0.01)
SEEDS = (0, 1, 5, 900450186894289455, 2**63 - 1)
SIZE = 512
BOUND = 5.0
GOLDEN = ["0001011101110011", "1110111000111111", "1001101010101100", "1110001011110101"]


def mask(seed: int, p: float, rows: int = SIZE, columns: int = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    return masks.kept(torch.tensor(seed), rows, columns, p, dtype)


def standard(seed: int, p: float, rows: int = SIZE, columns: int = SIZE) -> Tensor:
    """Return the mask with mean 0 and variance 1, if it is what it should be."""
    keeping = masks.keeping(p)
    return (mask(seed, p, rows, columns) - keeping) / (keeping * (1 - keeping)) ** 0.5


def error(products: Tensor) -> float:
    """Return the mean in units of its standard error; of products of independent standard numbers, which is 0."""
    return abs(float(products.sum())) / products.numel() ** 0.5


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("seed", SEEDS)
def test_share_that_is_kept_is_the_one_that_is_scaled_by(seed: int, p: float):
    assert error(standard(seed, p)) < BOUND


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("seed", SEEDS)
def test_entries_are_independent_along_rows_and_columns(seed: int, p: float):
    drawn = standard(seed, p)
    for lag in (*range(1, 17), 32, 64, 256):  # eight entries of 8 bits come from one word
        assert error(drawn[:, lag:] * drawn[:, :-lag]) < BOUND
        assert error(drawn[lag:] * drawn[:-lag]) < BOUND
    for down, right in itertools.product((1, 2, 8, 64), (1, 3, 4, 8, 64)):
        assert error(drawn[down:, right:] * drawn[:-down, :-right]) < BOUND
        assert error(drawn[down:, :-right] * drawn[:-down, right:]) < BOUND
    assert error((drawn * drawn.t()).triu(1)[0:]) < BOUND, "rows and columns are hashed alike"


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_corners_of_rectangles_are_independent(seed: int, p: float):
    """The hash begins with a sum of a row's word and a column's: one corner follows from the three others there."""
    drawn = standard(seed, p)
    for down, right in itertools.product((1, 2, 3, 8, 128), (1, 4, 8, 16, 128)):
        top, bottom = drawn[:-down], drawn[down:]
        assert error(top[:, :-right] * top[:, right:] * bottom[:, :-right] * bottom[:, right:]) < BOUND


@pytest.mark.parametrize("p", P)
def test_sums_of_rows_and_of_columns_vary_as_they_should(p: float):
    drawn = standard(SEEDS[3], p)
    for dim in (0, 1):
        sums = drawn.sum(dim) / SIZE**0.5
        assert abs(float(sums.square().mean()) - 1) < BOUND * (2 / SIZE) ** 0.5
    assert float(torch.linalg.matrix_norm(drawn, 2)) < 1.1 * 2 * SIZE**0.5, "no pattern of low rank"


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_masks_of_other_seeds_are_independent(p: float):
    near = [SEEDS[3] + step for step in (0, 1, 2, SIZE, SIZE + 1)] + [SEEDS[3] ^ (1 << 62), 0, 1, -1]
    for one, other in itertools.combinations(near, 2):
        a, b = standard(one, p), standard(other, p)
        assert error(a * b) < BOUND
        assert error(a[1:] * b[:-1]) < BOUND
        assert error(a[:, 8:] * b[:, :-8]) < BOUND


def test_every_threshold_of_eight_bits_cuts_where_it_should():
    """Chi-square of the 256 bytes, which one seed shows by its masks at all thresholds: 255 ± 5 · √510."""
    kept_ones = torch.tensor([float(mask(SEEDS[3], step / 256).sum()) for step in range(256)] + [0.0])
    counts = kept_ones[:-1] - kept_ones[1:]
    expected = SIZE * SIZE / 256
    chi = float((counts - expected).square().sum() / expected)
    assert abs(chi - 255) < BOUND * 510**0.5
    assert kept_ones[0] == SIZE * SIZE
    assert all(masks.bits_for(step / 256) == 8 for step in range(256))


@pytest.mark.parametrize("p", [0.5, 0.1, 0.01])
def test_a_mask_with_more_dropped_drops_those_as_well(p: float):
    more = p + 4 / 256
    if masks.bits_for(p) == masks.bits_for(more):
        assert bool((mask(5, more) <= mask(5, p)).all())


@pytest.mark.parametrize(
    ("p", "bits", "keeping"),
    [
        (0.0, 8, 1.0),
        (0.5, 8, 0.5),
        (0.25, 8, 0.75),
        (0.1, 8, 1 - 26 / 256),
        (0.05, 8, 1 - 13 / 256),
        (0.01, 16, 1 - 655 / 65536),
        (0.001, 16, 1 - 66 / 65536),
        (0.3, 8, 1 - 77 / 256),
        (0.9, 8, 1 - 230 / 256),
        (0.99, 16, 1 - 64881 / 65536),
        (1.0, 8, 0.0),
    ],
)
def test_eight_bits_do_where_they_come_within_two_percent(p: float, bits: int, keeping: float):
    assert (masks.bits_for(p), masks.keeping(p)) == (bits, keeping)
    assert masks.is_possible(p) == (keeping > 0)


def test_probability_is_never_further_off_than_two_percent():
    for step in range(1, 1000):
        p = step / 1000
        assert abs(1 - masks.keeping(p) - p) <= 0.02 * min(p, 1 - p)


@pytest.mark.parametrize("p", [0.1, 0.01], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_any_size_has_a_mask_of_zeros_and_ones(rows: int, columns: int, p: float):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        drawn = mask(5, p, rows, columns, dtype)
        assert (drawn.shape, drawn.dtype) == ((rows, columns), dtype)
        assert bool(((drawn == 0) | (drawn == 1)).all())
        assert drawn.is_contiguous()


def test_columns_at_the_edge_are_dropped_as_often_as_others():
    for columns, p in itertools.product((5, 9, 17), (0.3, 0.01)):
        assert error(standard(SEEDS[3], p, 20000, columns)[:, -1]) < BOUND


def test_seed_decides_and_is_not_changed():
    seed = torch.tensor(5)
    first = masks.kept(seed, 40, 30, 0.3, torch.float32)
    assert torch.equal(masks.kept(seed, 40, 30, 0.3, torch.float32), first)
    assert int(seed) == 5
    assert not torch.equal(masks.kept(torch.tensor(6), 40, 30, 0.3, torch.float32), first)


@pytest.mark.parametrize("rows", [0, 1, 64, 200])
def test_parts_of_a_mask_are_those_of_the_whole(rows: int, monkeypatch):
    monkeypatch.setattr(masks, "_ENTRIES", 1)
    parts = list(masks.kept_in_parts(torch.tensor(5), rows, 30, 0.3, torch.float32))
    assert len(parts) == max(1, -(-rows // 64))
    whole = masks.kept(torch.tensor(5), rows, 30, 0.3, torch.float32)
    assert torch.equal(torch.cat([part for _, part in parts]), whole)
    assert all(torch.equal(whole[which], part) for which, part in parts)


def test_golden_mask():
    """What a seed stands for is the same on every machine and in every version, or checkpoints would differ."""
    rows = ["".join(str(int(bit)) for bit in row) for row in mask(2026, 0.5, 4, 16)]
    assert rows == GOLDEN


def test_seeds_come_from_torch_generator():
    x = torch.zeros(1)
    torch.manual_seed(3)
    first = [int(masks.new_seed(x)) for _ in range(3)]
    torch.manual_seed(3)
    assert [int(masks.new_seed(x)) for _ in range(3)] == first
    assert len(set(first)) == 3


# -- in a layer


def layer(p: float, width: int = 16, **lora: bool) -> nn.Module:
    """Return a layer of base 0 whose adapter is dropout alone: B A = 1."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, bias=False)).double()
    base[0].weight.data.zero_()
    tuned = lora_fx.apply(base, zoo.rules("0", r=width, alpha=width, dropout=p, **lora), backend="modules").train()
    for factor in (tuned[0].lora_A, tuned[0].lora_B):
        factor["default"].weight.data.copy_(torch.eye(width))
    return tuned


@pytest.mark.parametrize("p", [0.5, 0.1, 0.01])
def test_expectation_of_dropout_is_what_came_in(p: float):
    tuned, x = layer(p), torch.rand(16, dtype=torch.float64) + 0.5
    dropped = tuned(x.expand(20000, 16)).detach()
    deviation = x * (p / (1 - p)) ** 0.5 / 20000**0.5
    assert bool(((dropped.mean(0) - x).abs() < BOUND * 1.05 * deviation).all())
    values = torch.stack([torch.zeros_like(x), x / masks.keeping(p)])
    assert bool((dropped.unsqueeze(1) - values).abs().amin(1).max() < 1e-12), "kept and scaled, or dropped"


def test_each_call_drops_others_and_manual_seed_repeats_a_step():
    tuned, x = layer(0.5), torch.ones(8, 16, dtype=torch.float64)
    runs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        tuned.zero_grad()
        results = [tuned(x), tuned(x)]
        sum(result.square().sum() for result in results).backward()
        runs.append([*results, *(p.grad.clone() for p in lora_fx.parameters(tuned))])
        assert not torch.equal(*results)
    assert all(map(torch.equal, runs[0], runs[1]))
    assert not any(map(torch.equal, runs[0], runs[2]))


def test_backward_pass_drops_what_the_forward_pass_dropped():
    tuned, x = layer(0.5), torch.ones(8, 16, dtype=torch.float64, requires_grad=True)
    y = tuned(x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_layers_of_one_model_drop_independently():
    torch.manual_seed(0)
    model = nn.Sequential(layer(0.5)[0], layer(0.5)[0])
    x = torch.ones(500, 16, dtype=torch.float64)
    first, second = (module(x).detach() / 2 for module in model)
    assert error((2 * first - 1) * (2 * second - 1)) < BOUND


@pytest.mark.parametrize("share", [True, False])
def test_layers_that_share_drop_the_same_of_one_input_and_anew_at_the_next_call(share: bool):
    q, k = (layer(0.5, share_dropout=share)[0] for _ in range(2))
    x = torch.ones(50, 16, dtype=torch.float64)
    first, second, again = q(x), k(x), q(x)
    assert torch.equal(first, second) == share
    assert not torch.equal(first, again)
    assert not torch.equal(again, k(x.clone())), "another input, if an equal one"


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpoints_on_one_input_that_share_run_again_with_what_they_dropped(reentrant: bool):
    """As cross-attention of several layers on what one encoder gives: the first has drawn for all."""
    blocks = [nn.Sequential(layer(0.5, share_dropout=True)[0], nn.Dropout(0.5)) for _ in range(3)]
    x = torch.ones(20, 16, dtype=torch.float64, requires_grad=True)
    results = [checkpoint(block, x, use_reentrant=reentrant) for block in blocks]
    sum(results).sum().backward()
    for block, result in zip(blocks, results, strict=True):
        kept = (result.detach() != 0).double()  # by the adapter's dropout and by the other; B A = 1
        whole = block[0].lora_B["default"].weight.grad
        assert torch.equal(whole.diagonal(), 4 * kept.sum(0))


def test_eval_drops_nothing():
    tuned, x = layer(0.5), torch.ones(8, 16, dtype=torch.float64)
    torch.testing.assert_close(tuned.eval()(x), x, rtol=0, atol=1e-12)
    assert not torch.equal(tuned.train()(x), x)


def test_probability_near_one_falls_back_on_torch():
    tuned, x = layer(0.5), torch.ones(200, 16, dtype=torch.float64)
    for p in (0.999999, 1.0):
        assert not masks.is_possible(p)
        tuned[0].lora_dropout["default"].p = p
        torch.manual_seed(3)
        result = tuned(x)
        torch.manual_seed(3)
        assert torch.equal(result, F.dropout(x, p))


def test_statistics_notice_a_bad_mask():
    good = standard(SEEDS[3], 0.5)
    assert error(good + 0.02) > BOUND
    for bad in (good.roll(1, 1) * 0.05 + good, good[:, :1].expand_as(good)):
        assert error(bad[:, 1:] * bad[:, :-1]) > BOUND
    rank_one = good[:1] * good[:, :1]
    assert error(rank_one[1:, 1:] * rank_one[:-1, :-1] * rank_one[1:, :-1] * rank_one[:-1, 1:]) > BOUND
