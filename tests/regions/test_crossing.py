"""Encoders leave out padding though decoders attend to what they give: what comes of it is what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.liveness.padding import forbidden_keys
from lora_fx.regions.install import regions
from tests.support.paddedmodels import BATCH, assert_same_step, padded, pair

transformers = pytest.importorskip("transformers")
ALL = ("stack", "recompute", "liveness", "loss")
SIZES = {"vocab_size": 60, "d_model": 32}


def t5() -> nn.Module:
    layers = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    return _built(
        transformers.T5ForConditionalGeneration, transformers.T5Config(decoder_start_token_id=0, **SIZES, **layers)
    )


def bart() -> nn.Module:
    layers: dict[str, Any] = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    layers |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    layers |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64) | dict.fromkeys(("dropout",), 0.0)
    return _built(transformers.BartForConditionalGeneration, transformers.BartConfig(**SIZES, **layers))


def _built(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(1)
    config.use_cache = False
    model: nn.Module = kind(config)
    return model.double()


def inputs(length: int = 7, masked: bool = False) -> dict[str, Tensor]:
    """Return padded sentences, and labels of another length, with padding of their own if masked."""
    labels = torch.randint(1, 60, (BATCH, length), generator=torch.Generator().manual_seed(3))
    given = {**padded(), "labels": torch.where(torch.arange(length) % 3 > 0, labels, -100)}
    if masked:
        given["decoder_attention_mask"] = mask = (torch.arange(length) < torch.tensor([[7], [5], [3], [2]])).long()
        given["labels"] = torch.where(mask > 0, given["labels"], -100)
    return given


def its_loss(outputs: Any) -> Tensor:
    loss: Tensor = outputs.loss
    return loss


@pytest.mark.parametrize("build", [pytest.param(t5, marks=pytest.mark.slow), bart], ids=lambda build: build.__name__)
def test_the_padding_of_an_encoder_is_not_computed_and_gradients_are_those_of_the_forward(build: Any) -> None:
    late, plain = pair(build(), inputs(), optimise=ALL)
    for length, masked in ((7, False), (7, True), (7, True), (5, False), (7, True)):
        assert_same_step(late, plain, its_loss, **inputs(length, masked))
    packing = {path: region.tally for path, _, region in regions(late) if "encoder" in path}
    # once for all blocks: the first call with a mask of its own is one that no graph fits yet
    assert [(tally.packed, tally.asked) for tally in packing.values()] == [(5, 1)] * 2
    given_up = [why for region in lora_fx.inspect(late).regions for why in region.given_up]
    assert not any("rows of padding are used" in why for why in given_up)
    memory = late(**inputs()).encoder_last_hidden_state
    torch.testing.assert_close(memory + 0, plain(**inputs()).encoder_last_hidden_state + 0)


@pytest.mark.slow
def test_a_decoder_that_attends_to_padding_gets_it() -> None:
    late, plain = pair(t5(), inputs(), optimise=ALL)
    for _ in range(3):
        assert_same_step(late, plain, its_loss, **inputs())
    encoded = late.encoder(**padded())
    every = {"encoder_outputs": encoded, "attention_mask": torch.ones_like(padded()["attention_mask"])}
    theirs = {**every, "encoder_outputs": plain.encoder(**padded())}
    torch.testing.assert_close(
        late(labels=inputs()["labels"], **every).loss, plain(labels=inputs()["labels"], **theirs).loss
    )


@pytest.mark.parametrize("low", [None, float("-inf"), torch.finfo(torch.float32).min])
def test_keys_are_forbidden_where_no_query_of_a_sequence_may_read_them(low: float | None) -> None:
    allowed = torch.ones(3, 1, 2, 4, dtype=torch.bool)
    allowed[0, :, :, 3] = allowed[1, :, 0, 2] = allowed[2, :, 1] = allowed[2, :, :, 0] = False
    mask = allowed if low is None else torch.where(allowed, 0.0, low)
    found = forbidden_keys(mask, 3, 4)
    assert found is not None
    assert found.tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
    assert forbidden_keys(mask, 3, 5) is forbidden_keys(mask, 2, 4) is None
