"""Real architectures, tiny: every linear adapted, nearly all of them in graphs at sizes never seen, none wrong."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tests.support import shared, zoo
from tests.support.examining import EVERY_KIND, RULES, Findings, examine

MODELS = shared.load("models")
NAMES = tuple(MODELS.zoo()) if MODELS is not None else ()
QUICK = ("bert", "llama", "vit", "mamba", "nn.TransformerEncoder", "nanogpt")
OLD = torch.torch_version.TorchVersion(torch.__version__) < "2.10"
NEVER_CALLED = {"mamba": {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}}
"""Their weight is read inside of a loop over the sequence, which is one call for the graph."""


@functools.cache
def findings(name: str, dtype: torch.dtype, every_kind: bool = False) -> Findings:
    assert MODELS is not None
    torch.manual_seed(0)
    model, inputs = MODELS.zoo()[name]()
    rules = EVERY_KIND if every_kind else RULES
    return examine(MODELS.zero_dropout(model), inputs, MODELS.main_tensors, dtype, rules)


def check(name: str, dtype: torch.dtype) -> None:
    outcome = findings(name, dtype)
    assert outcome.wrong == []
    assert outcome.linears <= outcome.adapted


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "mamba")) for name in NAMES if name in QUICK]
)
def test_architecture_is_right_at_other_sizes_and_its_blocks_run_in_graphs(name: str):
    check(name, torch.float32)
    outcome = findings(name, torch.float32)
    without_kernel = name == "nn.TransformerEncoder" and OLD  # torch 2.9 cannot run its fused layer on fake tensors
    assert outcome.in_blocks - outcome.in_graphs == NEVER_CALLED.get(
        name, outcome.in_blocks if without_kernel else set()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_right_at_other_sizes(name: str):
    check(name, torch.float32)  # the test below does it in half precision, too


@pytest.mark.slow
def test_ninety_eight_percent_of_the_linears_in_blocks_run_in_graphs():
    every = [findings(name, torch.float32) for name in NAMES]
    in_blocks, in_graphs = (
        sum(len(getattr(outcome, what)) for outcome in every) for what in ("in_blocks", "in_graphs")
    )
    print(f"{in_graphs} of {in_blocks} linears in blocks ran in graphs at every call")
    assert in_graphs >= 0.98 * in_blocks


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_right_with_adapters_of_every_kind(name: str, dtype: torch.dtype):
    outcome = findings(name, dtype, every_kind=True)
    print(f"{name}, {dtype}: {len(outcome.adapted)} sites adapted, {outcome.graph_sites} of them in graphs")
    assert outcome.wrong == []
    assert outcome.linears <= outcome.adapted


class Wrong(nn.Module):
    """A block whose graph was made wrong on purpose, below."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(zoo.Mlp() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_examination_finds_a_graph_that_computes_something_else(monkeypatch):
    from lora_fx.regions import install, learning, program

    real = program.make_program

    def sabotaged(captured, module, passes, static=False):
        made = real(captured, module, (), static)  # without the fast code, which is compared with the forward once more
        function = made.function
        made.function = lambda *inputs: function(*inputs) * (1 + (inputs[1].shape[0] == 4))
        return made

    for place in (install, learning):  # graphs of the base, and those captured later
        monkeypatch.setattr(place, "program_for", sabotaged)
    outcome = examine(Wrong().eval(), lambda batch, length: ((zoo.features(batch, length),), {}), lambda out: [out])
    assert outcome.wrong
    assert all("(4, 12)" in wrong for wrong in outcome.wrong)
