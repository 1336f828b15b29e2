"""The parts of what is kept of frozen blocks: which blocks, digests, rows that are apart, and room."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.capture.calls.ambient import ambient_state
from lora_fx.regions.prefix.chains import frozen_chains
from lora_fx.regions.prefix.code import Independence
from lora_fx.regions.prefix.digests import digest, digest_of, digests_of_rows
from lora_fx.regions.prefix.entries import Entry, KeptOutputs
from lora_fx.regions.prefix.rows import rows_of
from tests.support.prefixes import Block, Stack, adapted, bert, llama, stacked


def paths(model: nn.Module) -> list[list[str]]:
    return [[path for path, _ in chain] for chain in frozen_chains(model)]


def test_the_leading_blocks_of_a_list_that_nothing_trains() -> None:
    assert paths(adapted(llama())) == [["model.layers.0", "model.layers.1"]]
    assert paths(adapted(bert())) == [["bert.encoder.layer.0", "bert.encoder.layer.1"]]
    assert paths(lora_fx.apply(llama(), r=2)) == []
    everything = adapted(llama())
    everything.model.layers[0].mlp.up_proj.weight.requires_grad_()
    assert paths(everything) == []


def test_layers_are_no_blocks_and_lists_inside_of_blocks_are_parts_of_them() -> None:
    inner = Block(experts=nn.ModuleList([Block(), Block()]))
    rules = {"version": 1, "rules": [{"match": {"name": "blocks.1.linear"}, "lora": {"r": 2, "alpha": 4}}]}
    assert paths(lora_fx.apply(Stack([inner, Block()]), rules)) == [["blocks.0"]]
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    rules = {"version": 1, "rules": [{"match": {"name": "2"}, "lora": {"r": 2, "alpha": 4}}]}
    assert paths(lora_fx.apply(layers, rules)) == []


def test_digests_tell_every_bit_shape_dtype_and_layout_apart() -> None:
    x = torch.arange(6.0).view(2, 3)
    others = [x.double(), x.view(3, 2), x.t().contiguous().t(), x.clone(), torch.zeros(2, 3), -torch.zeros(2, 3)]
    others[3].view(-1)[5] = torch.nextafter(torch.tensor(5.0), torch.tensor(6.0))
    assert len({digest_of(tensor) for tensor in (x, *others)}) == 7
    assert digest_of(x) == digest_of(x.clone())
    assert digest("ab", "c") != digest("a", "bc")


def test_digests_of_rows_are_those_of_the_rows_wherever_they_stand() -> None:
    x = torch.randn(4, 3, 2)
    one, other = digests_of_rows(x), digests_of_rows(x.flip(0))
    assert one == other[::-1]
    assert len(set(one)) == 4
    assert digests_of_rows(x[1:2]) == one[1:2]
    assert len(set(digests_of_rows(x[:1].expand(4, 3, 2)))) == 1


def independence(body, x: Tensor) -> Independence:
    given = ((x,), {})
    return rows_of(lambda arguments: body(*arguments[0]), given, body(x), ambient_state({x.device}))


def test_rows_are_apart_only_where_nothing_of_the_others_reaches_them() -> None:
    torch.manual_seed(0)
    x, linear = torch.randn(4, 3, 8), nn.Linear(8, 8)
    with torch.no_grad():
        assert independence(lambda x: torch.tanh(x) * 3, x) == Independence(True, True)
        assert independence(linear, x).apart  # a product of 3 rows may sum in another order than one of 12
        mixing = [
            lambda x: linear(x) - x.mean(0),
            lambda x: x + x.roll(1, 0),
            lambda x: x * torch.arange(1.0, 1 + len(x))[:, None, None],  # where it stands
            lambda x: x / x.abs().max().clamp(min=9.0),  # only where another row is far off
            lambda x: x.softmax(0),
        ]
        assert [independence(body, x).apart for body in mixing] == [False] * len(mixing)
        assert independence(lambda x: x * len(x), x) == Independence(True, False)


def test_code_that_fails_on_other_rows_is_kept_as_whole_calls() -> None:
    def body(x: Tensor) -> Tensor:
        if len(x) == 1 or bool((x[0] == x[1]).all()):
            raise ValueError("no")
        return x

    assert independence(body, torch.randn(3, 2)) == Independence(False, False)


def entry(size: int = 2) -> Entry:
    return Entry(b"", torch.zeros(size))


def test_what_is_kept_stays_while_it_is_asked_for() -> None:
    kept = KeptOutputs(capacity=3 * 8)
    data = [bytes([number]) for number in range(6)]
    for _ in range(4):
        found = [kept.get(key) is not None for key in data]
        for key, there in zip(data, found, strict=True):
            if not there:
                kept.put(key, entry())
    assert found == [True] * 3 + [False] * 3
    assert (len(kept), kept.bytes, kept.left_out) == (3, 24, 3 + 3 * 3)


def test_what_nobody_asks_for_any_more_gives_way() -> None:
    kept = KeptOutputs(capacity=2 * 8)
    for key in (b"a", b"b"):
        kept.get(key)
        kept.put(key, entry())
    for _ in range(6):
        for key in (b"c", b"d"):
            if kept.get(key) is None:
                kept.put(key, entry())
    assert kept.get(b"c") is not None
    assert kept.get(b"a") is None
    assert kept.bytes <= 16


def test_an_entry_that_is_larger_than_all_room_is_left_out() -> None:
    kept = KeptOutputs(capacity=8)
    kept.put(b"a", entry(3))
    assert (len(kept), kept.bytes, kept.left_out) == (0, 0, 1)
    kept.put(b"a", entry(2))
    kept.put(b"a", entry(1))
    assert (len(kept), kept.bytes) == (1, 4)


def test_an_adapted_stack_has_its_head_after_the_blocks() -> None:
    tuned = stacked(None, None)
    assert paths(tuned) == [["blocks.0", "blocks.1"]]
