"""What a recorder writes while a model is trained: right losses and norms, once, whole, and only where it may."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.graphdiff.deltas.measure import singular_values
from lora_fx.training.lines import RecordFileError
from lora_fx.training.norms import norms_of, product_square, watched_in
from tests.adapters.test_site_kinds import every_kind
from tests.support import runs, zoo
from tests.support.processes import in_processes
from tests.support.sitekinds import Kind, randomise_

SPREAD = pytest.mark.parametrize("every", [1, 5, 100])


@SPREAD
def test_lines_hold_the_mean_of_the_losses_since_the_line_before_and_the_last_step_has_one(tmp_path, every):
    tuned = runs.adapted()
    with lora_fx.Recorder(tuned, tmp_path / "run.jsonl", every=every) as recorder:
        losses = runs.train(tuned, recorder, runs.batches())
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    ends = sorted({*range(every, 13, every), 12})
    assert [line.step for line in record.steps] == ends
    for start, line in zip([0, *ends], record.steps, strict=False):
        assert line.loss == pytest.approx(sum(losses[start : line.step]) / (line.step - start), rel=1e-6)
        assert line.mean_of == line.step - start
    assert not record.untrained()


@every_kind
def test_norms_are_those_of_the_singular_values_for_every_kind_of_site(kind: Kind):
    tuned = kind.adapted()
    randomise_(tuned)
    found = norms_of(watched_in(tuned))
    assert found == pytest.approx([site.norm for site in lora_fx.deltas(tuned).sites], rel=1e-9)


def test_norms_never_need_the_large_matrix():
    B, A = torch.randn(200_000, 4).double(), torch.randn(4, 200_000).double()  # B A would take 320 GB
    assert product_square(B, A).sqrt().item() == pytest.approx(singular_values(B, A).norm().item(), rel=1e-12)


def test_norms_are_as_accurate_as_said_where_columns_cancel():
    torch.manual_seed(1)
    column, row = torch.randn(300, 1).double(), torch.randn(1, 200).double()
    for size in (1e-2, 1e-5, 1e-9):
        B = torch.cat([column, column], 1)
        A = torch.cat([row, -row + size * torch.randn(1, 200).double()])
        exact = singular_values(B, A).norm().item()
        found = product_square(B, A).clamp_min(0).sqrt().item()
        assert abs(found - exact) <= 1e-8 * B.norm().item() * A.norm().item()


def test_untrained_adapters_have_norms_of_exactly_0(tmp_path):
    tuned = runs.adapted()
    recorder = lora_fx.Recorder(tuned, tmp_path / "run.jsonl", every=1)
    recorder.step(1.5)
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    assert set(record.steps[0].norms) == {0.0}
    assert len(record.untrained()) == 6


def test_header_says_what_is_recorded(tmp_path):
    lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=1).step(None)
    head, line = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert (head["schema_version"], head["kind"], head["model"]) == (1, "lora_fx training record", "Sequential")
    assert head["sites"][1] == {
        "path": "0.down", "rule": "rule 1", "r": 2, "scaling": 2.0, "layer": "0", "call": None, "adapter": "",
    }  # fmt: skip
    assert (line["step"], line["loss"], line["mean_of"]) == (1, None, 0)


def test_nothing_is_written_before_the_first_line_and_folders_are_made(tmp_path):
    recorder = lora_fx.Recorder(runs.adapted(), tmp_path / "new" / "run.jsonl", every=2)
    recorder.step(1.0)
    assert not (tmp_path / "new").exists()
    recorder.step(2.0)
    assert lora_fx.read_record(tmp_path / "new" / "run.jsonl").steps[0].loss == 1.5


def test_losses_are_read_at_writing_time_only_and_may_be_changed_in_place_in_between(tmp_path):
    class Counted(torch.Tensor):
        reads = 0

        def __float__(self) -> float:
            Counted.reads += 1
            return super().__float__()

    recorder = lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=3)
    loss = torch.tensor([4.0]).as_subclass(Counted)
    recorder.step(loss)
    loss.zero_()
    recorder.step(torch.tensor(1.0, dtype=torch.bfloat16))
    assert Counted.reads == 0
    recorder.step(torch.tensor(1.0, requires_grad=True))
    assert lora_fx.read_record(tmp_path / "run.jsonl").steps[0].loss == 2.0


def test_loss_of_many_values_is_refused(tmp_path):
    recorder = lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl")
    with pytest.raises(RefusedError, match="4 values"):
        recorder.step(torch.zeros(4))


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_every_must_be_a_number_of_steps(tmp_path, every):
    with pytest.raises(ValueError, match="every is"):
        lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=every)


def test_steps_may_go_on_by_more_than_one(tmp_path):
    recorder = lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=5)
    for step in range(2, 21, 2):
        recorder.step(1.0, step)
    assert [line.step for line in lora_fx.read_record(tmp_path / "run.jsonl").steps] == [6, 10, 16, 20]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_are_valid_json_and_told(tmp_path, value):
    with lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=2) as recorder:
        for loss in (1.0, 1.0, torch.tensor(value), 1.0, 2.0):
            recorder.step(loss)
    for line in (tmp_path / "run.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    assert record.steps[1].loss == pytest.approx(value, nan_ok=True)
    name = "NaN" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    assert f"! loss is {name} at step 4 (mean of steps 3 to 4)" in str(record)
    json.loads(record.to_json(), parse_constant=pytest.fail)


def test_adapters_that_are_no_numbers_are_told(tmp_path):
    tuned = runs.adapted()
    tuned[1].up.lora_B["default"].weight.data[0, 0] = math.nan
    lora_fx.Recorder(tuned, tmp_path / "run.jsonl", every=1).step(1.0)
    text = str(lora_fx.read_record(tmp_path / "run.jsonl"))
    assert "! ΔW is not finite from step 1, in 1 of 6 sites" in text
    assert "logging_nan_inf_filter" in text


def failing(recorder: lora_fx.Recorder, before: Callable[[], None]) -> None:
    with recorder:
        recorder.step(3.0)
        before()
        raise KeyError("mine")


def test_last_step_is_written_after_an_exception_and_the_exception_comes_through(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        failing(lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl"), lambda: None)
    assert lora_fx.read_record(tmp_path / "run.jsonl").steps[0].loss == 3.0


def test_a_record_that_fails_does_not_take_the_place_of_the_exception(tmp_path):
    path = tmp_path / "run.jsonl"
    with pytest.raises(KeyError) as caught:
        failing(lora_fx.Recorder(runs.adapted(), path), path.mkdir)
    assert "was not written" in caught.value.__notes__[0]


# -- models


def test_models_without_adapters_or_values_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="not adapted"):
        lora_fx.Recorder(runs.base(), tmp_path / "run.jsonl")
    with torch.device("meta"):
        model = runs.Layer()
    tuned = lora_fx.apply(model, zoo.rules("*"), backend="modules")
    with pytest.raises(RefusedError, match=r"no values(.|\n)*up *its adapter is on the meta device"):
        lora_fx.Recorder(tuned, tmp_path / "run.jsonl")


def test_pieces_of_adapters_are_refused_when_a_line_is_due(tmp_path):
    tuned = runs.adapted()
    recorder = lora_fx.Recorder(tuned, tmp_path / "run.jsonl", every=1)
    tuned[0].up.lora_A["default"].weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(RefusedError, match=r"holds a piece of it, \[0\]"):
        recorder.step(1.0)
    assert not (tmp_path / "run.jsonl").exists()


class Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, Holder], ids=["compile", "DataParallel", "part"])
def test_what_stands_around_a_model_changes_nothing_in_its_record(tmp_path, wrap):
    plain, wrapped = runs.adapted(), wrap(runs.adapted())
    for name, model in (("plain", plain), ("wrapped", wrapped)):
        recorder = lora_fx.Recorder(model, tmp_path / name, every=4)
        inner = plain if model is plain else next(m for m in wrapped.modules() if type(m).__name__ == "Sequential")
        runs.train(inner, recorder, runs.batches())
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "wrapped").read_bytes()


def test_graph_modules_and_models_that_run_as_graphs_are_recorded_alike(tmp_path):
    graph = lora_fx.apply(torch.fx.symbolic_trace(runs.base()), runs.RULES)
    blocks = lora_fx.apply(runs.base(), runs.RULES, (runs.batches()[0][0],))
    for name, model in (("graph", graph), ("blocks", blocks), ("modules", runs.adapted())):
        model.load_state_dict(runs.adapted().state_dict())
        with lora_fx.Recorder(model, tmp_path / name, every=5) as recorder:
            runs.train(model, recorder, runs.batches())
    graph, blocks, modules = (lora_fx.read_record(tmp_path / name) for name in ("graph", "blocks", "modules"))
    assert [site.path for site in graph.sites] == [site.path for site in modules.sites]
    runs.assert_alike(blocks, modules)
    assert [list(line.norms) for line in graph.steps] == [
        pytest.approx(list(line.norms), rel=1e-4) for line in modules.steps
    ]


def test_several_adapted_models_in_one_module_are_told_apart(tmp_path):
    both = nn.ModuleDict({"a": runs.adapted(), "b": runs.adapted()})
    lora_fx.Recorder(both, tmp_path / "run.jsonl", every=1).step(1.0)
    record = lora_fx.read_record(tmp_path / "run.jsonl")
    assert [site.path for site in record.sites][5:7] == ["a.2.down", "b.0.up"]


def record_whole_and_sharded(folder):
    plain, sharded = runs.adapted(), runs.adapted()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for name, model in (("plain", plain), ("sharded", sharded)):
        with lora_fx.Recorder(model, folder / name, every=5) as recorder:
            runs.train(model, recorder, runs.batches())


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_sharded_adapters_are_gathered(tmp_path):
    in_processes(1, record_whole_and_sharded, tmp_path)
    one, other = (lora_fx.read_record(tmp_path / name) for name in ("plain", "sharded"))
    assert one.sites == other.sites
    for a, b in zip(one.steps, other.steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert list(a.norms) == pytest.approx(list(b.norms), rel=1e-5)


def test_adapters_inside_of_fsdp1_are_refused(tmp_path):
    class FullyShardedDataParallel(nn.Module):  # the real one cannot be put around an adapted layer
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    tuned = runs.adapted()
    tuned[1] = FullyShardedDataParallel(tuned[1])
    with pytest.raises(RefusedError, match="FSDP1"):
        lora_fx.Recorder(tuned, tmp_path / "run.jsonl")


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    with lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=1) as recorder:
        recorder.step(1.0)
    assert not (tmp_path / "run.jsonl").exists()
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    recorder.step(1.0)
    assert (tmp_path / "run.jsonl").exists()


WRONG = [
    (("a word",), "could not convert"),
    ((1j,), "real number"),
    ((torch.tensor(1j),), "the loss is complex"),
    ((torch.tensor(1.0, device="meta"),), "the loss is on the meta device"),
    ((torch.ones(2),), "the loss has 2 values"),
    ((1.0, -5), "step is -5"),
    ((1.0, 10**20), "step is 1000"),
    ((1.0, 2.7), "integer"),
    ((1.0, "7"), "integer"),
    ((1.0, 7, 0), "mean_of is 0"),
    ((1.0, 7, -1), "mean_of is -1"),
    ((1.0, 7, 2.5), "integer"),
]


@pytest.mark.parametrize(("given", "told"), WRONG)
def test_what_no_record_can_hold_is_refused_and_leaves_no_trace(tmp_path, given, told):
    recorder = lora_fx.Recorder(runs.adapted(), tmp_path / "run.jsonl", every=1)
    recorder.step(2.0)
    with pytest.raises((RefusedError, TypeError, ValueError), match=told):
        recorder.step(*given)
    recorder.step(4.0, torch.tensor(2))
    assert lora_fx.read_record(tmp_path / "run.jsonl").losses() == [(1, 2.0), (2, 4.0)]


def test_model_whose_names_nobody_could_read_again_is_refused_before_the_training(tmp_path):
    model = nn.Sequential()
    model.add_module("half\ud800", nn.Linear(4, 4))
    with pytest.raises(RecordFileError, match="could not be read again: holds half a character"):
        lora_fx.Recorder(lora_fx.apply(model, r=2, target="*"), tmp_path / "run.jsonl")
    assert not any(tmp_path.iterdir())
