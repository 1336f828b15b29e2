"""What programs of a model do otherwise than one would guess, in onnxruntime, torch.export and AOTInductor.

As in `test_surprising_readers`, of which these are the part that has graphs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.exporters import target_named
from lora_fx.models.samples import Sample
from tests.support.exporting import rule, tuned_of, written
from tests.support.zoo import rules

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE, EFFECT = 1e-5, 1e-2
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each client takes most of the time."""
    for name in ("onnx", "pt2"):
        monkeypatch.setattr(f"lora_fx.exporters.{name}.run_client", lambda _, client: client())


def verified(tuned: nn.Module, path: Path, target: str, sample: Sample, **options: Any) -> None:
    """Export, and hold what the real client computes to what ours does; skip where it is not installed."""
    for name in target_named(target).needs:
        pytest.importorskip(name)
    exported = lora_fx.export(tuned, path, target, sample, verify=True, **options)
    assert exported.difference is not None
    assert exported.difference <= exported.tolerance < EFFECT <= exported.effect


class Alike(nn.Module):
    """Linears of one shape, the second with the bias of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.b.bias.copy_(self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).tanh())


def alike() -> nn.Module:
    torch.manual_seed(0)
    return lora_fx.apply(Alike().eval(), rules("*", r=4, alpha=8, bias=True), backend="modules").eval()


def session(path: Path, level: str = "ORT_ENABLE_ALL") -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, ort.GraphOptimizationLevel.__members__[level]
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ran(running: Any, *adapters: Path, **fed: Any) -> Tensor:
    import onnxruntime as ort

    options, kept = ort.RunOptions(), [ort.LoraAdapter() for _ in adapters]
    for adapter, path in zip(kept, adapters, strict=True):
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
    return torch.from_numpy(running.run(None, {"x": X.numpy(), **fed}, options)[0])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the graph of a fresh adapter: every B is zero, and two biases are equal."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("onnx")
    lora_fx.export(alike(), folder / "model.onnx", "onnx", (X,))
    return folder


def trained(folder: Path, graph: Path, seed: int, *names: str) -> tuple[nn.Module, Path]:
    """Return the model with values in the adapters of some layers, or all, and its adapter for the graph."""
    tuned = alike()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and name.startswith(names or ""):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    path = folder / f"{seed}.onnx_adapter"
    lora_fx.export(tuned, path, "onnx", (X,), graph=graph)
    return tuned, path


def test_factors_that_are_equal_stay_apart_where_torch_onnx_makes_them_one(untrained, tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(untrained / "model.onnx").graph
    kept = {value.name for value in graph.initializer}
    assert {f"{layer}.{end}" for layer in "abc" for end in ("lora_A.weight", "lora_B.weight", "bias")} <= kept
    tuned, path = trained(tmp_path, untrained / "model.onnx", 1)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        running = session(untrained / "model.onnx", level)
        assert float((ran(running, path) - tuned(X)).abs().max()) < CLOSE
        with lora_fx.disabled(tuned):
            assert float((ran(running) - tuned(X)).abs().max()) < CLOSE

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.zeros(16, 16)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.first) + 1, self.second)

    made = torch.onnx.export(Pair(), (X,), dynamo=True, verbose=False)
    assert made is not None
    assert sum(name in ("first", "second") for name in made.model.graph.initializers) == 1


def test_onnxruntime_takes_the_first_of_two_adapters_and_an_adapter_before_what_is_fed(untrained, tmp_path):
    graph = untrained / "model.onnx"
    (one, first), (_, second) = (trained(tmp_path, graph, seed) for seed in (1, 2))
    running = session(graph)
    assert torch.equal(ran(running, first, second), ran(running, first))
    fed = {"a.lora_B.weight": torch.zeros(16, 4).numpy()}
    assert torch.equal(ran(running, first, **fed), ran(running, first))
    assert float((ran(running, first) - one(X)).abs().max()) < CLOSE


def test_adapters_of_one_export_have_no_parameter_in_common(tmp_path):
    pytest.importorskip("onnxruntime")
    chosen = written(rule("{a,c}"), rule("b", adapter="second"))
    tuned = tuned_of(Alike().eval(), chosen, (X,))
    lora_fx.export(tuned, tmp_path / "model.onnx", "onnx", (X,))
    files = [tmp_path / f"{name}.onnx_adapter" for name in ("default", "second")]
    running = session(tmp_path / "model.onnx")
    assert torch.equal(ran(running, *files), ran(running, *reversed(files)))
    assert float((ran(running, *files) - tuned(X)).abs().max()) < CLOSE


class Shadowed(nn.Linear):
    """Its argument has the name of its bias."""

    def forward(self, bias: Tensor) -> Tensor:
        return F.linear(bias, self.weight, self.bias)


def test_parameter_that_is_called_like_an_input_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    tuned = tuned_of(Shadowed(16, 16).eval(), rules("**", r=2, bias=True), (X,))
    with pytest.raises(ExportError, match=r"an input of the model has the name of a parameter\n  bias +is also called"):
        lora_fx.export(tuned, tmp_path / "model.onnx", "onnx", (X,))


@pytest.mark.parametrize("half", [False, True], ids=["float32 factors", "float16 factors"])
def test_half_precision_runs_with_the_dtype_that_the_graph_was_made_with(half, tmp_path):
    tuned = tuned_of(Alike().eval().half(), written(rule("*")), None)
    sample = Sample((X.half(),))
    verified(tuned.half() if half else tuned, tmp_path / "model.onnx", "onnx", sample)


@pytest.mark.parametrize(
    ("target", "graph", "adapter", "option", "more"),
    [
        ("onnx", "model.onnx", "x.onnx_adapter", "graph", {}),
        ("pt2", "model.pt2", "x.safetensors", "program", {"trust": True}),
    ],
)
def test_values_of_another_dtype_than_the_graphs_are_refused(target, graph, adapter, option, more, tmp_path):
    """onnxruntime raises when it runs, and AOTInductor computes something else."""
    for name in target_named(target).needs:
        pytest.importorskip(name)
    chosen = written(rule("a"), train=["c"])
    lora_fx.export(tuned_of(Alike().eval(), chosen, None), tmp_path / "made" / graph, target, (X,))
    half = tuned_of(Alike().eval().half(), chosen, None)
    with pytest.raises(ExportError, match=r"c\.weight +is float16, in the (graph|program) float32"):
        lora_fx.export(half, tmp_path / adapter, target, (X.half(),), **{option: tmp_path / "made" / graph}, **more)


# -- torch.export and AOTInductor


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mid, self.head = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.words(ids)).tanh())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_tied_weight_has_the_name_that_aotinductor_has_kept(tmp_path):
    torch.manual_seed(0)
    sample = Sample((torch.randint(0, 50, (2, 5)),))
    chosen = written(rule("mid"), train=["words", "head"])
    tuned = tuned_of(Tied().eval(), chosen, sample.args)
    verified(tuned, tmp_path / "model.pt2", "pt2", sample, compile=True)
    verified(tuned, tmp_path / "other.safetensors", "pt2", sample, program=tmp_path / "model.pt2", trust=True)
    assert sum("weight" in key and "lora" not in key for key in load_file(tmp_path / "other.safetensors")) == 1
