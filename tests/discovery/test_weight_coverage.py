"""Every weight that multiplies an activation is in the plan, adapted or refused with a reason: counted independently."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx.discovery.study import observed
from lora_fx.models.samples import samples_for
from lora_fx.planning.decide import decide, on_modules
from lora_fx.rules.reader import read_rules
from tests.support import shared, zoo
from tests.support.counting import Names, multiplying_weights

MODELS = shared.load("models")
NAMES = tuple(MODELS.zoo()) if MODELS is not None else ()
RULES = {"version": 1, "rules": [{"match": {"name": "**"}, "lora": {"r": 2}}]}
PLANNED, OTHER = (2, 10), (3, 15)
"""(batch, length) of the inputs that the plan gets, and of others."""
Inputs = Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]


def counted(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Names, set[str]]]:
    """Yield what multiplies in the model: in eval (with torch's fused layers and without) and in train mode."""
    for fused, training in ((True, False), (False, False), (True, True)):
        for shape in (PLANNED, OTHER):
            trial = copy.deepcopy(model).train(training)
            args, kwargs = inputs(*shape)
            torch.backends.mha.set_fastpath_enabled(fused)
            try:
                with torch.set_grad_enabled(training):
                    yield from multiplying_weights(trial, lambda: trial(*args, **kwargs)).items()
            finally:
                torch.backends.mha.set_fastpath_enabled(True)


def planned(model: nn.Module, inputs: Inputs) -> lora_fx.Plan:
    args, kwargs = inputs(*PLANNED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return on_modules(
            decide(read_rules(RULES), observed(model, samples_for(model, lora_fx.call(*args, **kwargs))).inventory)
        )


def missing(plan: lora_fx.Plan, uses: Iterable[tuple[Names, set[str]]]) -> dict[str, set[str]]:
    """Return the weights that multiply and that the plan neither adapts nor refuses with a reason, with the kernels."""
    explained = {name for site in plan.sites if _is_explained(site) for name in _weights_of(site)}
    missed: dict[str, set[str]] = {}
    for names, kernels in uses:
        if not names & explained:
            missed.setdefault(" = ".join(sorted(names)), set()).update(kernels)
    return missed


def _is_explained(site: Any) -> bool:
    return site.decision == "adapt" or (site.decision == "refuse" and bool(site.reason))


def _weights_of(site: Any) -> set[str]:
    """Return every name of a site's weight: its own, and that which each alias of its module gives it."""
    last = site.site.weight.rpartition(".")[2]
    return {site.site.weight, *site.site.aliases, *(f"{alias}.{last}" for alias in site.site.aliases)}


@pytest.mark.parametrize("name", NAMES)
def test_plan_names_every_weight_that_multiplies(name: str):
    assert MODELS is not None
    try:
        model, inputs = MODELS.zoo()[name]()
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        pytest.skip("diffusers is not installed")
    assert missing(planned(model, inputs), counted(model, inputs)) == {}


@pytest.mark.parametrize("specimen", zoo.ZOO, ids=lambda specimen: specimen.name)
def test_plan_names_every_weight_that_multiplies_in_small_models(specimen: zoo.Specimen):
    model = specimen.build()
    uses = list(counted(model, specimen.inputs))
    assert uses
    assert missing(planned(model, specimen.inputs), uses) == {}


class Hidden(nn.Module):
    """Products that no nn.Linear shows: strided, cast, picked, reparametrized, by vectors, and by several axes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.cast, self.computed = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))
        self.heads, self.output = nn.Parameter(torch.randn(16, 4, 4)), nn.Parameter(torch.randn(16, 4, 4))
        self.bank, self.vector = nn.Parameter(torch.randn(3, 16, 16)), nn.Parameter(torch.randn(16))
        self.patches = nn.Conv1d(16, 16, 1)
        self.rnn = nn.LSTM(16, 16)
        self.position, self.scale = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.ones(16, 16))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.position) @ self.plain.t()[:, 2:].contiguous() @ self.plain[:14]
        x = F.linear(x.double(), self.cast.double()).float()
        x = F.linear(x, self.computed / self.computed.norm(dim=1, keepdim=True))
        heads = torch.einsum("bsi,ihd->bshd", x, self.heads)
        x = torch.einsum("bshd,ohd->bso", heads, self.output)
        x = x @ self.bank[torch.tensor([2, 0])].sum(0)
        x = F.linear(x, self.patches.weight.squeeze(-1)) * (x @ self.vector)[..., None]
        return self.rnn(x)[0] * self.scale.sum(0)


HIDDEN = {"plain", "cast", "computed", "heads", "output", "bank", "vector", "patches.weight",
          "rnn.weight_ih_l0", "rnn.weight_hh_l0"}  # fmt: skip


def hidden_inputs(batch: int, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (zoo.features(batch, length),), {}


def test_counter_sees_products_wherever_they_are_written():
    assert {name for names, _ in counted(Hidden(), hidden_inputs) for name in names} == HIDDEN


def test_plan_names_products_wherever_they_are_written():
    model = Hidden()
    plan = planned(model, hidden_inputs)
    assert missing(plan, counted(model, hidden_inputs)) == {}
    shapes = {site.site.weight: site.shape for site in plan.adapted}
    assert shapes["heads"] == (16, 16)
    assert shapes["output"] == (16, 16)
    assert shapes["bank"] == (3, 16, 16)
    assert {site.site.weight for site in plan.refused} >= {"vector", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_weight_that_is_one_matrix_of_several_axes_is_adapted_and_merged():
    model = Hidden().eval()
    rules = {"version": 1, "rules": [{"match": {"name": ["heads", "output", "bank"]}, "lora": {"r": 2}}]}
    args, kwargs = hidden_inputs(2, 6)
    tuned = lora_fx.apply(model, rules, lora_fx.call(*args, **kwargs))
    assert torch.equal(tuned(*args), model(*args))
    zoo.randomise_(tuned)
    assert not torch.allclose(tuned(*args), model(*args))
    torch.testing.assert_close(lora_fx.merge(tuned)(*args), tuned(*args), rtol=1e-4, atol=1e-4)


class Joined(nn.Module):
    """Multiplies by the weights of its layers joined, as fused attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        joined = F.linear(x, torch.cat([self.q.weight, self.k.weight]))
        return joined, x @ torch.stack([self.q.weight, self.v.weight], -1).flatten(1).view(8, 16, 2)[..., 1].t()


def test_weights_of_layers_that_are_joined_before_they_multiply_are_used():
    model, x = Joined(), zoo.features(2, 6)
    rules = {"version": 1, "rules": [{"match": {"name": "*"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(model, rules, (x,))
    zoo.randomise_(tuned)
    assert {site.path: site.calls for site in lora_fx.plan(model, rules, (x,)).sites} == {"q": 2, "k": 1, "v": 1}
    for computed, dense, base in zip(tuned(x), lora_fx.merge(tuned)(x), model(x), strict=True):
        torch.testing.assert_close(computed, dense)
        assert not torch.allclose(computed, base)


def test_tied_weight_counts_for_each_module_that_multiplies_by_it():
    weights = {name for names, _ in counted(zoo.Gpt(), lambda *shape: ((zoo.tokens(*shape),), {})) for name in names}
    assert {"wte.weight", "lm_head.weight"} <= weights


def test_fused_layer_counts_by_the_matrices_that_its_kernel_gets():
    model = zoo.encoder_stack().eval()
    with torch.no_grad():
        result = multiplying_weights(model, lambda: model(zoo.features(2, 6)))
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    kernels = {"_transformer_encoder_layer_fwd"}
    assert result == {frozenset({f"layers.{n}.{name}"}): kernels for n in range(2) for name in names}


@pytest.mark.parametrize("lost", sorted(HIDDEN))
def test_plan_without_one_of_the_weights_is_found_incomplete(lost: str):
    model = Hidden()
    plan = planned(model, hidden_inputs)
    for broken in (
        tuple(site for site in plan.sites if site.site.weight != lost),
        tuple(dataclasses.replace(e, decision="keep") if e.site.weight == lost else e for e in plan.sites),
        tuple(dataclasses.replace(e, decision="refuse", reason="") if e.site.weight == lost else e for e in plan.sites),
    ):
        assert set(missing(dataclasses.replace(plan, sites=broken), counted(model, hidden_inputs))) == {lost}
