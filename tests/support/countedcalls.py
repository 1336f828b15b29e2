"""How often functions of the product are called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest


def counted_calls(monkeypatch: pytest.MonkeyPatch, functions: Iterable[tuple[object, str]]) -> Counter[str]:
    """Return a count, from now on, of the calls of functions, each given by what holds it and its name there."""
    counted: Counter[str] = Counter()

    def count(where: object, name: str) -> None:
        function = getattr(where, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(where, name, counting)

    for where, name in functions:
        count(where, name)
    return counted
