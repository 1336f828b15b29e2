"""What runs without a graph, and a part of the reason that is given; all others run in one."""

from __future__ import annotations

OUTCOMES: dict[str, str] = {}
SHARED_OUTCOMES: dict[str, str] = {}
