"""Attention of packed rows: one sequence after the other, as long as its real tokens are, where nothing minds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.bench.counters import saved_bytes
from lora_fx.liveness import sequences
from tests.regions.test_packing import packed_calls, real
from tests.support.paddedmodels import BATCH, LENGTH, PACKS, assert_same_step, bert, llama, padded, pair

ATTENTION = nn.functional.scaled_dot_product_attention


@contextmanager
def attention_seen() -> Iterator[list[tuple[int, int, int, bool]]]:
    """Note (sequences, queries, whether there is a mask) of each attention that is computed."""
    seen: list[tuple[int, int, int, bool]] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ATTENTION:
                mask = args[3] if len(args) > 3 else (kwargs or {}).get("attn_mask")
                seen.append((args[0].shape[0], args[0].shape[2], args[1].shape[2], mask is not None))
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


def with_hole() -> dict[str, Tensor]:
    inputs = padded()
    inputs["attention_mask"][1, 3:5] = 0
    return inputs


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(bert, with_hole()), (llama, padded(left=True)), (llama, with_hole())],
    ids=["bert", "left", "hole"],
)
def test_each_sequence_goes_alone_and_steps_are_the_same(build: Any, inputs: dict[str, Tensor]) -> None:
    packs, plain = pair(build(attn_implementation="sdpa"), inputs)
    mask = inputs["attention_mask"].bool()

    def of_real(outputs: Any) -> Tensor:
        kept: Tensor = outputs[0][mask]
        return (kept * torch.arange(kept.numel(), dtype=kept.dtype).cos().view(kept.shape)).sum()

    assert_same_step(packs, plain, of_real, **inputs)
    assert packed_calls(packs) == [1, 1, 1]
    with attention_seen() as seen:
        packs(**inputs)
    lengths = mask.sum(1).tolist()
    assert [call[:3] for call in seen] == [(1, length, length) for length in lengths] * 3
    assert not any(masked for *_, masked in seen), "what is left is all, or causal"


def test_sequences_that_are_too_short_and_dropout_of_attention_go_together(monkeypatch) -> None:
    monkeypatch.setattr(sequences, "FEWEST_TOKENS", LENGTH)
    packs, plain = pair(copy.deepcopy(llama(attn_implementation="sdpa")), padded())  # of which nothing is proven
    assert_same_step(packs, plain, real, **padded())
    with attention_seen() as seen:
        packs(**padded())
    assert seen == [(4, LENGTH, LENGTH, True)] * 3
    monkeypatch.undo()
    packs, _ = pair(bert(attention_probs_dropout_prob=0.2, attn_implementation="sdpa"), padded())
    for _ in range(2):
        packs(**padded())
    assert packed_calls(packs) == [2, 2, 2]
    with attention_seen() as seen:
        packs(**padded())
    assert {queries for _, queries, _, _ in seen} == {LENGTH}


class Attending(nn.Module):
    """Attention whose scores may depend on how long sequences are, padding included."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.scaled = scaled

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        scaled = query * (x.shape[1] / 7) if self.scaled else query
        return x + self.out(ATTENTION(scaled, key, value, attn_mask=mask)[:, 0])


class Tower(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attending(scaled) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask[:, None])
        return x


@pytest.mark.parametrize("scaled", [False, True])
def test_masks_of_pairs_are_parted_and_what_computes_with_the_length_of_a_batch_sees_all_of_it(scaled: bool) -> None:
    torch.manual_seed(0)
    real_ones = padded()["attention_mask"].bool()
    pairs = (torch.rand(BATCH, LENGTH, LENGTH) > 0.3) | torch.eye(LENGTH, dtype=torch.bool)
    mask = pairs & real_ones[:, None]
    inputs = {"x": torch.randn(BATCH, LENGTH, 16, dtype=torch.float64), "mask": mask}
    packs, plain = pair(Tower(scaled).double(), inputs)
    assert_same_step(packs, plain, lambda output: output[real_ones].square().sum(), **inputs)
    assert packed_calls(packs) == [1, 1]
    with attention_seen() as seen:
        packs(**inputs)
    whole = [(BATCH, LENGTH, LENGTH, True)]
    each = [(1, length, length, True) for length in real_ones.sum(1).tolist()]
    assert seen == 2 * (whole if scaled else each)


def test_attention_that_is_made_again_keeps_packed_rows_only() -> None:
    kept = []
    for optimise in (PACKS, (*PACKS, "attention")):
        packs, plain = pair(llama("LlamaModel", attn_implementation="sdpa"), padded(), optimise)
        assert_same_step(packs, plain, real, **padded())
        assert packed_calls(packs) == [1, 1, 1]
        kept.append(saved_bytes(lambda model=packs: model(**padded()), [*packs.parameters(), *packs.buffers()]))
    assert kept[1] < 0.85 * kept[0]


class Reading(nn.Module):
    """Attention to the own tokens, and to those of something read, which may be as many."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.other = Attending(False), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor, read: Tensor, its: Tensor) -> Tensor:
        x = self.own(x, mask)
        query, key, value = (layer(y)[:, None] for layer, y in zip(self.other, (x, read, read), strict=False))
        return x + self.other[3](ATTENTION(query, key, value, attn_mask=its)[:, 0])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reading() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, read: Tensor, its: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask[:, None, None], read, its[:, None, None])
        return x


def test_a_sequence_that_is_read_keeps_its_tokens_though_it_is_as_long() -> None:
    torch.manual_seed(0)
    x, read = torch.randn(2, BATCH, LENGTH, 16, dtype=torch.float64)
    mask = padded()["attention_mask"].bool()
    inputs = {"x": x, "mask": mask, "read": read, "its": mask}
    packs, plain = pair(Decoder().double(), inputs)
    for its in (mask, mask.flip(0), mask.flip(1)):  # where padding is the same, the first could not tell
        given = {**inputs, "its": its}
        assert_same_step(packs, plain, lambda output: output[mask].square().sum(), **given)
    assert packed_calls(packs) == [3, 3]
    with attention_seen() as seen:
        packs(**inputs)
    assert [call[:3] for call in seen[-BATCH:]] == [(1, length, LENGTH) for length in mask.sum(1).tolist()]
