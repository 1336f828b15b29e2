"""Garbage is collected as before after what went without, however it ended."""

from __future__ import annotations

import gc

import pytest

from lora_fx.models.collecting import collected_later


@pytest.mark.parametrize("is_on", [True, False])
def test_collections_go_on_if_they_did(is_on: bool):
    was_on = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        with collected_later(), collected_later():
            assert not gc.isenabled()
        assert gc.isenabled() is is_on
        with pytest.raises(KeyError), collected_later():
            raise KeyError
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if was_on else gc.disable)()
