"""What is nearly a plain layer: right, or refused by name with the reason and a way out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_fx
from tests.support.layerkinds import SUBCLASSES, Normalised, Scaled, hooked
from tests.support.sitekinds import BACKENDS, Kind, factors_of, randomise_, relative, run, same_values

ROWS = (torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)),)
IDS = (torch.tensor([[1, 4, 0], [2, 8, 8]]),)
WAYS_OUT = (
    "train it whole (`train:`)",
    "remove it (torch.nn.utils.parametrize) before",
    "remove that before",
    "use nn.",
)


class Held(nn.Module):
    """A layer in a model, of which the first result counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Tensor) -> Tensor:
        result = self.layer(*args)
        return result[0] if isinstance(result, tuple) else result


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved() -> nn.Module:
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "weight", Halved())
    return layer


def rules(name: str | list[str] = "**", **lora: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": name}, "lora": {"r": 2, **lora}}]}


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and met in old models
        return nn.utils.weight_norm(layer)


REFUSED: list[tuple[str, Callable[[], nn.Module], tuple[Tensor, ...], str]] = [
    ("a parametrization", halved, ROWS, "computed by a parametrization"),
    ("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(6, 5)), ROWS, "computed by a parametrization"),
    (
        "weight_norm of a convolution",
        lambda: parametrizations.weight_norm(nn.Conv1d(3, 5, 3)),
        ROWS,
        "computed by a parametrization",
    ),
    ("weight_norm as it was", lambda: old_weight_norm(nn.Linear(6, 5)), ROWS, "computed at each call"),
    (
        "weight_norm of a convolution as it was",
        lambda: old_weight_norm(nn.Conv1d(3, 5, 3)),
        ROWS,
        "computed at each call",
    ),
    ("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(6, 5)), ROWS, "computed by a parametrization"),
    ("spectral_norm as it was", lambda: nn.utils.spectral_norm(nn.Linear(6, 5)), ROWS, "computed at each call"),
    ("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(6, 6)), ROWS, "computed by a parametrization"),
    ("pruned", lambda: prune.l1_unstructured(nn.Linear(6, 5), "weight", 0.5), ROWS, "computed at each call"),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(3, 4, 3), ROWS, "transposed convolutions cannot"),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(2, 4, 3), ROWS, "transposed convolutions cannot"),
    ("Bilinear", lambda: nn.Bilinear(6, 6, 5), ROWS * 2, "multiplies by two inputs"),
    ("EmbeddingBag", lambda: nn.EmbeddingBag(9, 6), IDS, "sums inside of one kernel"),
    ("Embedding, max_norm", lambda: nn.Embedding(9, 6, max_norm=1.0), IDS, "max_norm rescales"),
]
RECURRENT = [
    ("LSTM", lambda: nn.LSTM(6, 4, 2), 4),
    ("LSTM with projections", lambda: nn.LSTM(6, 4, proj_size=2, bidirectional=True), 6),
    ("GRU", lambda: nn.GRU(6, 4, batch_first=True), 2),
    ("RNN", lambda: nn.RNN(6, 4), 2),
    ("LSTMCell", lambda: nn.LSTMCell(6, 4), 2),
    ("GRUCell", lambda: nn.GRUCell(6, 4), 2),
]


@pytest.mark.parametrize("given", [True, False], ids=["with inputs", "without inputs"])
@pytest.mark.parametrize("name, make, args, reason", REFUSED, ids=[kind[0] for kind in REFUSED])
def test_layer_is_refused_by_name_with_the_reason_and_a_way_out(
    name: str, make: Callable[[], nn.Module], args: tuple[Tensor, ...], reason: str, given: bool
):
    if name == "ConvTranspose2d":
        args = (torch.randn(1, 2, 5, 5),)
    model = Held(make()).eval()
    plan = lora_fx.plan(model, rules("layer"), args if given else None)
    assert [site.path for site in plan.refused] == ["layer"]
    assert plan.adapted == ()
    assert reason in plan.refused[0].reason
    assert any(way in plan.refused[0].reason for way in WAYS_OUT)
    with pytest.raises(lora_fx.RefusedError) as caught:
        lora_fx.apply(model, rules("layer"), args if given else None)
    assert "layer" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name, make, number", RECURRENT, ids=[kind[0] for kind in RECURRENT])
def test_every_matrix_of_a_recurrent_layer_is_refused(name: str, make: Callable[[], nn.Module], number: int):
    args = (ROWS[0][0],) if name.endswith("Cell") else ROWS
    for given in (args, None):
        plan = lora_fx.plan(Held(make()), rules(), given)
        assert len(plan.refused) == number
        assert all("train it whole (`train:`)" in site.reason for site in plan.refused)
        assert plan.adapted == ()


def test_what_is_refused_can_be_trained_whole():
    model = nn.Sequential(nn.Linear(6, 6), nn.Bilinear(6, 6, 2))
    with_rules = rules("0") | {"train": ["1"]}
    tuned = lora_fx.apply(model, with_rules)
    assert all(parameter.requires_grad for parameter in tuned[1].parameters())


def test_refused_layers_stand_beside_adapted_ones():
    model = nn.Sequential(nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)))
    with pytest.warns(lora_fx.LoraFxWarning, match="1 matched sites are not adapted"):
        tuned = lora_fx.apply(model, rules(), ROWS)
    assert [name for name, _ in tuned.named_parameters() if "lora_A" in name] == ["0.lora_A.default.weight"]


def test_lazy_layers_are_refused_until_they_know_their_sizes():
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyConv1d(4, 1))
    with pytest.raises(lora_fx.RefusedError, match="call the model once"):
        lora_fx.plan(model, rules(), ROWS)
    model(*ROWS)
    plan = lora_fx.plan(model, rules(), ROWS)
    assert [(site.path, site.op) for site in plan.adapted] == [("0", "linear"), ("1", "conv1d")]


class Dead(nn.Module):
    """A linear that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unused_layer_is_adapted_with_a_note_and_a_warning():
    model = Dead()
    plan = lora_fx.plan(model, rules(), ROWS)
    assert [(site.path, site.decision, site.calls) for site in plan.sites] == [
        ("used", "adapt", 1),
        ("unused", "adapt", 0),
    ]
    assert any("unused: never used with the example inputs" in note for note in plan.notes)
    with pytest.warns(lora_fx.LoraFxWarning, match="unused: never used with the example inputs"):
        tuned = lora_fx.apply(model, rules(), ROWS)
    assert torch.equal(tuned(*ROWS), model(*ROWS))
    randomise_(tuned)
    A, B = factors_of(tuned, "unused.weight")
    expected = F.linear(ROWS[0], model.unused.weight + 8 * B @ A, model.unused.bias)  # alpha 16 / r 2
    assert relative(tuned.unused(*ROWS), expected) <= 1e-5, "it computes right as soon as something uses it"
    assert relative(F.linear(*ROWS, tuned.unused.weight, tuned.unused.bias), expected) <= 1e-5, "or its weight"
    assert [site.passes for site in plan.sites] == [("fuse",), ("fuse",)]
    assert tuned.unused.adapted_term(*ROWS) is not None, "base and adapter are one operation, as the plan says"
    assert relative(lora_fx.merge(tuned).unused(*ROWS), expected) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_stay_on_an_adapted_layer_and_see_what_it_computes(backend: str):
    seen: list[Tensor] = []
    model = hooked().eval()
    model[0].register_forward_hook(lambda module, args, result: seen.append(result))
    tuned = lora_fx.apply(model, rules("0"), ROWS, backend=backend)
    randomise_(tuned)
    seen.clear()
    result = run(tuned, lora_fx.call(*ROWS))
    assert len(seen) == 1
    assert torch.equal(seen[0].flatten(), result)


def test_hook_that_is_added_later_acts():
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), rules("0"), ROWS)
    randomise_(tuned)
    before = tuned[0](*ROWS)
    tuned[0].register_forward_hook(lambda module, args, result: result * 3)
    assert torch.equal(tuned(*ROWS), (before * 3).relu())


def test_subclasses_keep_their_class_and_need_no_other_when_merged():
    for make in (lambda: Scaled(6, 5), lambda: Normalised(6, 5)):
        model = nn.Sequential(make()).eval()
        tuned = lora_fx.apply(model, rules("0"), ROWS)
        assert isinstance(tuned[0], type(model[0]))
        merged = lora_fx.merge(tuned)
        assert type(merged[0]) is type(model[0])
        assert same_values(merged, model), "B = 0"


@pytest.mark.parametrize(
    "kind", [kind for kind in SUBCLASSES if kind.name != "tied in one module"], ids=lambda k: k.name
)
def test_forward_of_a_subclass_runs_in_the_graph_of_its_block(kind: Kind):
    args = kind.sample().args
    model = nn.Sequential(Held(kind.build()[0]), nn.Tanh()).eval()
    tuned = lora_fx.apply(model, rules("0.layer"), args)
    assert [site.backend for site in lora_fx.inspect(tuned).sites] == ["graph"]
    randomise_(tuned)
    in_modules = lora_fx.apply(model, rules("0.layer"), args, backend="modules")
    in_modules.load_state_dict(tuned.state_dict())
    for training in (False, True):
        results = [run(model, lora_fx.call(*args), training, grad=training) for model in (tuned, in_modules)]
        assert torch.equal(*results)
    assert lora_fx.inspect(tuned).regions[0].hits > 0


class AsksValues(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * float(input.sum() > 0)


def replaced() -> nn.Linear:
    layer = nn.Linear(6, 5)
    layer.forward = lambda x: F.linear(x, layer.weight) * 2
    return layer


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: AsksValues(6, 5), "layer cannot run on fake tensors: "),
        (replaced, "it has hooks, or a forward of its own"),
    ],
    ids=["values of tensors", "forward on the instance"],
)
def test_plan_says_why_a_graph_calls_a_layer_as_a_whole(make: Callable[[], nn.Module], why: str):
    model = nn.Sequential(Held(make()), Held(nn.Linear(5, 6)))
    site, other = lora_fx.plan(model, rules("*.layer"), ROWS).adapted
    assert (site.backend, other.backend) == ("module", "graph")
    assert site.backend_reason.startswith(f"the graph of 0 calls 0.layer as a whole: {why}")


def test_subclass_with_a_weight_of_unknown_dtype_is_refused():
    class Quantised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 5)
            self.weight = nn.Parameter(torch.ones(5, 6, dtype=torch.int8), requires_grad=False)

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.float(), self.bias)

    plan = lora_fx.plan(nn.Sequential(Quantised()), rules("0"), ROWS)
    assert "what it does with a weight of type Parameter and dtype int8 is not known" in plan.refused[0].reason


def test_torch_layer_of_its_own_linear_class_is_a_plain_linear():
    model = nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(6, 5))
    tuned = lora_fx.apply(model, rules("0"), ROWS)
    assert torch.equal(tuned(*ROWS), model(*ROWS))
