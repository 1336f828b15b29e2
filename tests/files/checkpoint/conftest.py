"""Small checkpoints, one file or two, and an adapter that fits them."""

from __future__ import annotations

import pytest

from tests.support.merging import NORM, UP, Q, base_tensors, factors, write_adapter, write_base


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", base_tensors())


@pytest.fixture
def sharded(tmp_path):
    tensors = base_tensors()
    head = {name: tensors.pop(name) for name in (f"{Q}.weight", f"{NORM}.weight")}
    return write_base(tmp_path / "sharded", head, tensors)


@pytest.fixture
def both():
    return {**factors(Q, 48, 48), **factors(UP, 96, 48)}


@pytest.fixture
def adapter(tmp_path, both):
    return write_adapter(tmp_path / "adapter", both)
