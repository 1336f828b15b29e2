"""Clients of exports run in processes that need not import their libraries again."""

from __future__ import annotations

import pytest

from lora_fx.exporters import running
from tests.support.clientprocesses import ClientProcesses


@pytest.fixture(scope="package", autouse=True)
def _processes():
    processes = ClientProcesses()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "_run", processes.run)
        yield
    processes.close()
