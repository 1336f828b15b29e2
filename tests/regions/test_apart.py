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
def attention_seen() -> Iterator[list[tuple[int, int, bool]]]:
    """Note (sequences, queries, whether there is a mask) of each attention that is computed."""
    seen: list[tuple[int, int, bool]] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is ATTENTION:
                seen.append((args[0].shape[0], args[0].shape[2], (kwargs or {}).get("attn_mask") is not None))
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
    assert [(batch, queries) for batch, queries, _ in seen] == [(1, length) for length in lengths] * 3
    assert {masked for _, _, masked in seen} == {build is llama}, "of an encoder no mask is left"


def test_sequences_that_are_too_short_and_dropout_of_attention_go_together(monkeypatch) -> None:
    monkeypatch.setattr(sequences, "FEWEST_TOKENS", LENGTH)
    packs, plain = pair(copy.deepcopy(llama(attn_implementation="sdpa")), padded())  # of which nothing is proven
    assert_same_step(packs, plain, real, **padded())
    with attention_seen() as seen:
        packs(**padded())
    assert seen == [(4, LENGTH, True)] * 3
    monkeypatch.undo()
    packs, _ = pair(bert(attention_probs_dropout_prob=0.2, attn_implementation="sdpa"), padded())
    for _ in range(2):
        packs(**padded())
    assert packed_calls(packs) == [2, 2, 2]
    with attention_seen() as seen:
        packs(**padded())
    assert {queries for _, queries, _ in seen} == {LENGTH}


class Scaled(nn.Module):
    """Attention whose scores depend on how long sequences are, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        mixed = ATTENTION(query * (x.shape[1] / 7), key, value, attn_mask=mask)
        return x + self.out(mixed[:, 0])


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        return x


def test_what_computes_with_the_length_of_a_batch_sees_all_of_it() -> None:
    torch.manual_seed(0)
    mask = padded()["attention_mask"].bool()
    inputs = {"x": torch.randn(BATCH, LENGTH, 16, dtype=torch.float64), "mask": mask}
    packs, plain = pair(Tower().double(), inputs)
    assert_same_step(packs, plain, lambda output: output[mask].square().sum(), **inputs)
    assert packed_calls(packs) == [1, 1]
    with attention_seen() as seen:
        packs(**inputs)
    assert {queries for _, queries, _ in seen} == {LENGTH}


def test_attention_that_is_made_again_keeps_packed_rows_only() -> None:
    kept = []
    for optimise in (PACKS, (*PACKS, "attention")):
        packs, plain = pair(llama("LlamaModel", attn_implementation="sdpa"), padded(), optimise)
        assert_same_step(packs, plain, real, **padded())
        assert packed_calls(packs) == [1, 1, 1]
        kept.append(saved_bytes(lambda model=packs: model(**padded()), [*packs.parameters(), *packs.buffers()]))
    assert kept[1] < 0.85 * kept[0]
