"""DoRA of every kind of weight, merged in files: the weights that a merge in memory gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.support import kinds
from tests.support.kinds import built, in_ours, in_peft
from tests.support.merging import loaded, write_base
from tests.support.peftkinds import each

CASES: dict[str, tuple[Any, list[str]]] = {
    "convolutions": (kinds.Convolutions, ["line", "plane", "space"]),
    "embedding": (kinds.Tokens, ["words"]),
    "embedding and linear": (kinds.Tokens, ["words", "out"]),
    "square raw parameter, stored [in, out]": (kinds.Matrices, ["first.w"]),
    "raw parameters": (kinds.Matrices, ["pair.z", "pair.a"]),
}


class SquareTokens(kinds.Tokens):
    """An embedding with as many tokens as dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(50, 50, padding_idx=0), nn.Linear(50, 7)


def assert_same_in_files(base: nn.Module, tuned: nn.Module, folder) -> None:
    stored = {name: tensor.contiguous() for name, tensor in base.state_dict().items()}
    lora_fx.merge_checkpoint(write_base(folder / "base", stored), folder / "adapter", folder / "merged")
    merged, expected = loaded(folder / "merged"), lora_fx.merge(tuned).state_dict()
    assert merged.keys() == expected.keys()
    assert any(not torch.equal(merged[key], stored[key]) for key in stored)
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_files_of_ours_merge_as_in_memory(case: str, tmp_path):
    kind, names = CASES[case]
    base = built(kind)
    tuned = in_ours(base, tmp_path / "adapter", {"rules": [each(name, 3, dora=True) for name in names]}, kind.inputs)
    assert_same_in_files(base, tuned, tmp_path)


@pytest.mark.parametrize("case", ["convolutions", "embedding", "embedding and linear"])
def test_files_of_peft_merge_as_in_memory(case: str, tmp_path):
    kind, names = CASES[case]
    base = built(kind)
    in_peft(base, tmp_path / "adapter", r=3, target_modules=names, use_dora=True)
    assert_same_in_files(base, lora_fx.load(base, tmp_path / "adapter", kind.inputs), tmp_path)


@pytest.mark.parametrize("dora", [False, True])
def test_embedding_with_as_many_tokens_as_dimensions_is_one(dora: bool, tmp_path):
    base = built(SquareTokens)
    in_peft(base, tmp_path / "adapter", r=3, target_modules=["words"], use_dora=dora)
    assert_same_in_files(base, lora_fx.load(base, tmp_path / "adapter", SquareTokens.inputs), tmp_path)
