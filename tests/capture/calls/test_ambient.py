"""The state around a call."""

from __future__ import annotations

import pytest
import torch

from lora_fx.capture.calls.ambient import in_clean_thread


def test_clean_thread_sees_no_modes_returns_results_and_raises_errors():
    with torch.no_grad():
        assert in_clean_thread(torch.is_grad_enabled) is True
    with pytest.raises(ZeroDivisionError):
        in_clean_thread(lambda: 1 / 0)
    threads = torch.get_num_threads()
    assert in_clean_thread(torch.get_num_threads) == threads
