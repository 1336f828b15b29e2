"""Where the batch is: sizes that could mean something else, models that have it second, and what only looks like one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import lora_fx
from tests.support.twoadapters import two

Q = {"version": 1, "rules": [{"match": {"name": ["q", "out_q"]}, "lora": {"r": 2, "alpha": 8, "init": "random"}}]}
NAMES = ["b", None, "a", "a"]


def with_b(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    tuned = lora_fx.apply(model.eval(), Q, backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, Q, adapter="b")
    return tuned


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(2))


class Placed(nn.Module):
    """Takes positions of its tokens, which all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.q(torch.tanh(x + places[None, :, None]))


def one_by_one(tuned: nn.Module, names: list[str | None], x: Tensor, *more: Tensor, dim: int = 0) -> Tensor:
    """Return what the rows give alone."""
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(x.narrow(dim, number, 1), *more))
    return torch.cat(results, dim)


@pytest.mark.parametrize("rows", [4, 2])
def test_positions_of_as_many_tokens_as_there_are_rows_are_not_the_batch(rows):
    tuned, names = with_b(Placed()), NAMES[:rows]
    x, places = tokens(rows, rows), torch.linspace(0, 2, rows)
    with lora_fx.rows(tuned, names):
        together = tuned(x, places)
        again = tuned(x, places)
    assert_close(together, one_by_one(tuned, names, x, places), atol=1e-6, rtol=1e-6)
    assert torch.equal(together, again)


class Masked(nn.Module):
    """Attention with a mask of tokens against tokens, which all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out_q = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ x.transpose(1, 2) + mask
        return self.out_q(scores.softmax(-1) @ x)


def test_a_mask_of_as_many_tokens_as_there_are_rows_is_not_the_batch():
    tuned = with_b(Masked())
    x, mask = tokens(4, 4), torch.full((4, 4), -torch.inf).triu(1)
    with lora_fx.rows(tuned, NAMES):
        together = tuned(x, mask)
    assert_close(together, one_by_one(tuned, NAMES, x, mask), atol=1e-6, rtol=1e-6)


class TimeFirst(nn.Module):
    """Its inputs have the batch second, and attention mixes what is first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out_q = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        scores = torch.einsum("tbc,sbc->bts", self.q(x), x)
        if padding is not None:
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        return x + self.out_q(torch.einsum("bts,sbc->tbc", scores.softmax(-1), x))


@pytest.mark.parametrize("length", [5, 4, 8])
def test_models_with_the_batch_second_say_so(length):
    tuned, x = with_b(TimeFirst()), tokens(length, 4)
    with lora_fx.rows(tuned, NAMES, dim=1):
        together = tuned(x)
        tuned(tokens(7, 4))
    assert_close(together, one_by_one(tuned, NAMES, x, dim=1), atol=1e-6, rtol=1e-6)


def test_a_mask_that_has_the_batch_first_goes_with_inputs_that_have_it_second():
    tuned, x = with_b(TimeFirst()), tokens(4, 4)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 2:] = padding[2, 3:] = True
    with lora_fx.rows(tuned, NAMES, dim=1):
        together = tuned(x, padding)
    for row, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            alone = tuned(x[:, row : row + 1], padding[row : row + 1])
        assert_close(together[:, row : row + 1], alone, atol=1e-6, rtol=1e-6)


def test_as_many_tokens_as_rows_are_no_batch_where_they_hear_of_each_other():
    tuned = with_b(TimeFirst())
    with lora_fx.rows(tuned, NAMES), pytest.raises(lora_fx.RefusedError, match="cannot be seen"):
        tuned(tokens(4, 4))


def test_what_hears_only_a_little_of_other_tokens_is_no_batch_either():
    model = TimeFirst()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.02)
    tuned = with_b(model)
    with lora_fx.rows(tuned, NAMES), pytest.raises(lora_fx.RefusedError, match="cannot be seen"):
        tuned(tokens(4, 4))


def test_torchs_own_encoder_which_reads_its_weights_is_refused():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0)
    rules = {"version": 1, "rules": [{"match": {"name": "**.linear*"}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), rules, backend="modules")
    lora_fx.add(tuned, rules, adapter="b")
    refused = pytest.raises(lora_fx.RefusedError, match="code reads")
    with refused, lora_fx.rows(tuned, ["default", "b", None], dim=1):
        tuned(tokens(5, 3))


def test_the_batch_has_one_of_two_dimensions():
    with pytest.raises(ValueError, match="dim is 2; the batch is dimension 0 or 1"), lora_fx.rows(two(), ["a"], dim=2):
        pass


@pytest.mark.parametrize("dim", [0, 1])
def test_one_name_is_for_one_row(dim):
    tuned, places = with_b(Placed()), torch.linspace(0, 2, 5)
    x = tokens(3, 5)
    with lora_fx.rows(tuned, ["a"], dim=dim), pytest.raises(lora_fx.RefusedError, match="for 1 rows"):
        tuned(x, places[:1].expand(5) if dim else places)


class MixesRows(nn.Module):
    """Takes the mean over the batch off, as no model that treats rows apart does."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x - x.mean(0))


def test_rows_that_hear_of_each_other_are_refused():
    tuned = with_b(MixesRows())
    with lora_fx.rows(tuned, NAMES), pytest.raises(lora_fx.RefusedError, match="cannot be seen"):
        tuned(tokens(4, 5))


class MovesTokens(nn.Module):
    """Moves tokens from row to row before its layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.q = how, nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = x.flatten(0, 1)
        if self.how == "rolled":
            return self.q(flat.roll(1, 0)).view_as(x)
        if self.how == "exchanged":  # one token of the first row with one of the third
            return self.q(x.index_put((torch.tensor([0, 2]), torch.tensor([1, 1])), x[[2, 0], 1]))
        if self.how == "sorted":
            return self.q(x[x.sum((1, 2)).argsort()])
        if self.how == "faint":
            return self.q(x + 0.01 * x.roll(2, 0).mean(1, keepdim=True))
        assert mask is not None
        kept = mask.flatten().nonzero()[:, 0]  # packed: what is no padding
        return torch.zeros_like(flat).index_copy(0, kept, self.q(flat[kept])).view_as(x)


@pytest.mark.parametrize(
    ("how", "length"),
    [("rolled", 1), ("rolled", 700), ("exchanged", 700), ("sorted", 1), ("faint", 5), ("packed", 1), ("packed", 700)],
)
def test_tokens_that_move_between_rows_are_refused_whatever_their_number(how, length):
    tuned = with_b(MovesTokens(how))
    mask = torch.ones(4, length, dtype=torch.long)
    with lora_fx.rows(tuned, NAMES), pytest.raises(lora_fx.RefusedError, match=r"cannot be seen\n +q +its input is"):
        tuned(tokens(4, length), mask)


class Picks(nn.Module):
    """Takes one token of each row, as the end of a text is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.q = nn.Embedding(40, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.q(self.words(ids)[torch.arange(len(ids)), ids.argmax(-1)])


def test_a_token_that_is_picked_in_its_own_row_is_that_rows():
    tuned = with_b(Picks())
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(3))
    with lora_fx.rows(tuned, NAMES):
        together = tuned(ids)
    assert_close(together, one_by_one(tuned, NAMES, ids), atol=1e-6, rtol=1e-6)


class PacksPadded(MovesTokens):
    """Packs where there is padding, and only there."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(x, mask) if not mask.all() else self.q(x.flatten(0, 1)).view_as(x)


def test_a_batch_with_padding_is_looked_at_though_one_without_was():
    tuned, x, mask = with_b(PacksPadded("packed")), tokens(4, 6), torch.ones(4, 6, dtype=torch.long)
    with lora_fx.rows(tuned, NAMES):
        together = tuned(x, mask=mask)
        mask[1, 2:] = 0  # four tokens less, so that there are as many for each row
        with pytest.raises(lora_fx.RefusedError, match=r"cannot be seen\n +q +its input is \[20, 6\]"):
            tuned(x, mask=mask)
    assert_close(together, one_by_one(tuned, NAMES, x, mask[:1].fill_(1)), atol=1e-6, rtol=1e-6)
