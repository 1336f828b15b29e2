"""Samples of inputs in all forms that users give."""

from __future__ import annotations

import torch

from lora_fx.models.samples import call, samples_of


def test_all_forms_of_inputs_mean_samples():
    x = torch.zeros(1)
    assert samples_of((x,))[0].args == (x,)
    assert samples_of({"x": x})[0].kwargs == {"x": x}
    assert samples_of(call(x, y=1))[0] == call(x, y=1)
    assert len(samples_of([(x,), {"x": x}])) == 2
