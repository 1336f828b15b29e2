"""A .pt2 file is a program: no verb opens one without --trust."""

from __future__ import annotations

import pytest

from tests.support.clitools import run
from tests.support.merging import factors, write_adapter


@pytest.mark.parametrize("verb", ["plan", "explain", "diff", "bench", "inspect", "export"])
def test_program_is_read_with_trust_only(tmp_path, verb):
    adapter = write_adapter(tmp_path / "adapter", factors("fc", 4, 4))
    (tmp_path / "a.pt2").write_bytes(b"is not looked at")
    more = {"explain": ["fc", "attention"], "export": [adapter, "--target", "peft", "-o", tmp_path / "x"]}
    before = [adapter] if verb == "inspect" else []
    result = run(verb, *before, tmp_path / "a.pt2", *more.get(verb, [] if before else ["attention"]))
    assert result.exit_code == 2
    assert "a.pt2: is a program, and reading it can run any code that is in it" in result.stderr
