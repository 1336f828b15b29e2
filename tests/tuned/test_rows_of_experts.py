"""An adapter for each row of a batch in models with routed experts: right, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers")

import lora_fx
from tests.support.moe import FEW_CROSSED, IDS, IMPLEMENTATIONS, rules, two

NAMES = ["b", None, "a"]


ATTENTION, EXPERTS = rules("**.{q,v}_proj"), rules("**.experts.*_proj")


def logits(tuned: nn.Module, ids: Tensor = IDS) -> Tensor:
    result: Tensor = tuned(input_ids=ids, use_cache=False).logits
    return result


def one_by_one(tuned: nn.Module, names: list[str | None]) -> Iterator[Tensor]:
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            yield logits(tuned, IDS[number : number + 1])


@FEW_CROSSED
def test_rows_have_adapters_of_the_attention_around_routed_experts(implementation: str, kind: str):
    tuned = two(implementation, ATTENTION, rules("**.{k,o}_proj", r=3), kind)
    with lora_fx.rows(tuned, NAMES):
        together = logits(tuned)
        generated = tuned.generate(IDS, max_new_tokens=4, do_sample=False)
    assert_close(together, torch.cat(list(one_by_one(tuned, NAMES))), atol=1e-4, rtol=1e-4)
    with lora_fx.use(tuned, None):
        assert (logits(tuned) - together).abs().amax((1, 2)).gt(1e-2).tolist() == [True, False, True]
    for number, name in enumerate(NAMES):
        with lora_fx.use(tuned, name):
            alone = tuned.generate(IDS[number : number + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0], generated[number])


def test_gradients_reach_each_adapter_from_its_own_rows():
    tuned = two("eager", ATTENTION, ATTENTION)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        tuned.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}

    with lora_fx.rows(tuned, NAMES):
        together = gradients(logits(tuned).square().mean((1, 2)).sum())
    apart = gradients(torch.cat(list(one_by_one(tuned, NAMES))).square().mean((1, 2)).sum())
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert_close(gradient, apart[name], atol=1e-5, rtol=1e-3)


@IMPLEMENTATIONS
def test_banks_are_refused_by_name_and_everything_goes_on(implementation: str):
    tuned = two(implementation, ATTENTION, EXPERTS)
    logits(tuned)  # the first call fits no graph yet, and may round otherwise
    before = logits(tuned)
    refused = pytest.raises(lora_fx.RefusedError, match=r"code reads an adapted weight(.|\n)*experts.down_proj +'b' is")
    with refused, lora_fx.rows(tuned, ["b", None, None]):  # before any call
        pass
    assert torch.equal(logits(tuned), before)
    names = ["a", None, "a"]
    with lora_fx.rows(tuned, names):
        together = logits(tuned)
    assert_close(together, torch.cat(list(one_by_one(tuned, names))), atol=1e-4, rtol=1e-4)


# -- experts as modules, of which each gets the tokens that are routed to it


class Routed(nn.Module):
    """Two experts, each a linear; a token goes to the one that its values choose."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(width, 2), nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.reshape(-1, x.shape[-1]), torch.zeros_like(x.reshape(-1, x.shape[-1]))
        chosen = self.router(flat).argmax(-1)
        for number, expert in enumerate(self.experts):
            tokens = (chosen == number).nonzero()[:, 0]
            out = out.index_add(0, tokens, expert(flat[tokens]))
        return x + out.view_as(x)


class Dense(Routed):
    """The same, with all tokens for both experts, and weights for their results."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights = self.router(flat).softmax(-1)
        mixed = sum(weights[:, number : number + 1] * expert(flat) for number, expert in enumerate(self.experts))
        return x + mixed.view_as(x)  # type: ignore[union-attr]


class Words(nn.Module):
    """An embedding in front."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.words, self.block = nn.Embedding(30, 6), kind()

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.words(ids))


def linears(made: nn.Module) -> nn.Module:
    chosen = rules("**.experts.*", "experts.*")
    tuned = lora_fx.apply(made, chosen, backend="modules")
    lora_fx.rename(tuned, "default", "a")
    lora_fx.add(tuned, chosen, adapter="b")
    return tuned


def tokens(rows: int, length: int, seed: int, same: bool) -> Tensor:
    x = torch.randn(1 if same else rows, length, 6, generator=torch.Generator().manual_seed(seed))
    return x.expand(rows, -1, -1)


def each_alone(tuned: nn.Module, names: list[str | None], x: Tensor) -> Tensor:
    results = []
    for number, name in enumerate(names):
        with lora_fx.use(tuned, name):
            results.append(tuned(x[number : number + 1]))
    return torch.cat(results)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("same", [True, False], ids=["same prompts", "other prompts"])
@pytest.mark.parametrize("words", [True, False], ids=["ids", "values"])
@pytest.mark.sampled(3)
def test_layers_whose_tokens_are_picked_by_values_get_no_adapters_of_rows(
    seed: int, length: int, same: bool, words: bool
):
    torch.manual_seed(seed)
    tuned = linears(Words(Routed) if words else Routed())
    names = ["a", "b", None, "a"]
    for number, is_same in enumerate((same, False)):  # what was seen in the first call holds for the second
        x = tokens(4, length, seed + number, is_same)
        x = (x[..., 0] * 1000).long().abs() % 30 if words else x
        try:
            with lora_fx.rows(tuned, names):
                together = tuned(x)
        except lora_fx.RefusedError:
            continue
        assert_close(together, each_alone(tuned, names, x), atol=1e-5, rtol=1e-5)


class Sent(Routed):
    """Sends each token to the expert whose bias is larger: all to one, whatever they are, until biases change."""

    how = "each"

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.router.weight)
        self.router.bias = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = self.router(flat).argmax(-1)
        if self.how == "each":
            tokens = torch.where(chosen == 0)[0]
            return x + torch.zeros_like(flat).index_add(0, tokens, self.experts[0](flat[tokens])).view_as(x)
        if self.how == "mask":
            out = torch.zeros_like(flat)
            out[chosen == 0] = self.experts[0](flat[chosen == 0])
            return x + out.view_as(x)
        if self.how == "sorted":
            order = torch.argsort(chosen, stable=True)
            return x + self.experts[0](flat[order])[order.argsort()].view_as(x)
        slots = torch.zeros_like(flat).index_copy(0, chosen.cumsum(0) + torch.arange(len(flat)), flat)
        return x + self.experts[0](slots)[chosen.cumsum(0) + torch.arange(len(flat))].view_as(x)


@pytest.mark.parametrize("how", ["each", "mask", "sorted", "slots"])
def test_an_expert_that_has_all_tokens_in_each_look_is_refused_all_the_same(how: str):
    model = nn.Sequential(Sent(), nn.Linear(6, 6))
    model[0].how = how
    torch.manual_seed(0)
    tuned = linears(model)
    lora_fx.add(tuned, rules("1"), adapter="behind")
    refused = pytest.raises(
        lora_fx.RefusedError, match=r"cannot be seen\n +0.experts.0 +its input is \[8, 6\]\n(?! +1)"
    )
    with lora_fx.rows(tuned, ["a", "b"]), refused:
        tuned(tokens(2, 4, 0, same=False))
    with lora_fx.rows(tuned, ["behind", None]):  # where tokens are back in their places
        together = tuned(tokens(2, 4, 0, same=False))
    assert_close(together, each_alone(tuned, ["behind", None], tokens(2, 4, 0, same=False)), atol=1e-6, rtol=1e-6)
    with lora_fx.rows(tuned, ["behind", "b"]), pytest.raises(lora_fx.RefusedError, match=r"0\.experts\.0"):
        tuned(tokens(2, 4, 0, same=False))  # a call of a kind that is known


def test_the_refusal_names_the_layers():
    torch.manual_seed(0)
    tuned = linears(Routed())
    refused = pytest.raises(lora_fx.RefusedError, match=r"cannot be seen\n +experts.0 (.|\n)*experts.1 ")
    with lora_fx.rows(tuned, ["a", "b"]), refused:
        tuned(tokens(2, 8, 0, same=True))


@pytest.mark.parametrize("words", [True, False], ids=["ids", "values"])
@pytest.mark.parametrize("same", [True, False])
def test_experts_that_all_get_every_token_are_layers_like_others(same: bool, words: bool):
    torch.manual_seed(0)
    tuned = linears(Words(Dense) if words else Dense())
    x = tokens(4, 6, 0, same)
    x = (x[..., 0] * 1000).long().abs() % 30 if words else x
    names = ["a", "b", None, "a"]
    with lora_fx.rows(tuned, names):
        together = tuned(x)
    assert_close(together, each_alone(tuned, names, x), atol=1e-5, rtol=1e-5)
