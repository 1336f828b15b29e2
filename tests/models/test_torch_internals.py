"""Private torch, pinned."""

from __future__ import annotations

import torch
from torch import nn

from lora_fx.models import torch_internals


def test_private_torch_still_behaves_as_we_rely_on():
    fakes = torch_internals.Fakes()
    fake = fakes.tensor(torch.zeros(2, 5, 8), "x", [False, False, False])
    weight = nn.Parameter(torch.zeros(8, 8))
    with fakes.active():
        out = nn.functional.linear(fake, weight)
        wide = fake.shape[1] > 4
    assert isinstance(out, torch_internals.FakeTensor)
    assert wide
    sizes = [size for size in fake.shape if isinstance(size, torch.SymInt)]
    guards = fakes.guards(sizes, ["a", "b", "c"][: len(sizes)])
    assert "2 <= a" in guards
    assert "5 <= b" in guards
    assert "c == 8" in guards
    assert torch_internals.constant_of(fake.shape[2]) == 8
    assert all(isinstance(table, dict) for table in torch_internals.global_hook_tables())
