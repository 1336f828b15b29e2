"""What the tests of remerge compare, and which library a case needs."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import fx, nn

from tests.support import zoo

X = zoo.features(2, 3)


TOLERANCE = 1e-6


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def assert_equal(one: nn.Module, other: nn.Module, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        difference = (one(X) - other(X)).abs().max().item()
    assert difference <= tolerance


def targets(graph_module: fx.GraphModule) -> str:
    return " ".join(str(node.target) for node in graph_module.graph.nodes)
