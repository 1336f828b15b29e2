"""torch.export and AOTInductor: adapters are parameters of a program, and are put in and taken out by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from lora_fx.errors import ExportError, LoraFxError
from lora_fx.exporters import export
from lora_fx.exporters import pt2 as target
from lora_fx.models.samples import Sample
from tests.adapters.test_site_kinds import KINDS
from tests.support.peers import BERT, DIT, LLAMA, T5, UNET, VIT, Peer, each
from tests.support.peers import adapted as adapted_peer
from tests.support.programs import CLOSE, EFFECT, MIXED, adapted
from tests.support.sitekinds import Kind
from tests.support.sitekinds import randomise_ as randomise_kind_
from tests.support.zoo import call_encoder, randomise_, rules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own, while they trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the program of `adapted(MIXED)` and its values."""
    made = tmp_path_factory.mktemp("pt2")
    exported = export(adapted(MIXED), made / "model.pt2", "pt2", call_encoder(3, 7), verify=True)
    assert exported.difference is not None
    assert exported.difference <= CLOSE
    assert exported.effect >= EFFECT
    return made


@torch.no_grad()
def distance(module: Any, tuned: nn.Module, sample: Sample) -> float:
    return float((module(**sample.kwargs) - tuned(**sample.kwargs)).abs().max())


@pytest.mark.slow
def test_values_lie_beside_the_program(folder: Path):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["default.safetensors", "model.base.safetensors", "model.pt2", "top.safetensors"]
    top = load_file(folder / "top.safetensors")
    assert sorted(top)[:2] == [
        "layer.2.attention.dense.lora_A.default.weight",
        "layer.2.attention.dense.lora_B.default.weight",
    ]


def test_base_and_adapters_at_every_size(folder: Path):
    tuned, module = adapted(MIXED), torch.export.load(folder / "model.pt2").module()
    for batch, length in ((3, 7), (5, 2)):
        sample = call_encoder(batch, length)
        module.load_state_dict(load_file(folder / "model.base.safetensors"), strict=False)
        with lora_fx.disabled(tuned):
            assert distance(module, tuned, sample) <= CLOSE
        for name in ("default", "top"):
            module.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
        assert distance(module, tuned, sample) <= CLOSE


def test_another_adapter_is_put_into_the_same_program_whatever_its_scaling_and_at_a_lower_rank(
    folder: Path, tmp_path: Path
):
    other, sample = adapted(rules("layer.1.**.{query,value}", r=3, alpha=30), 2), call_encoder(4, 5)
    export(other, tmp_path / "other.safetensors", "pt2", sample, program=folder / "model.pt2", trust=True)
    module = torch.export.load(folder / "model.pt2").module()
    module.load_state_dict(load_file(folder / "model.base.safetensors"), strict=False)
    before = module(**sample.kwargs)
    module.load_state_dict(load_file(tmp_path / "other.safetensors"), strict=False)
    assert distance(module, other, sample) <= CLOSE
    assert float((module(**sample.kwargs) - before).abs().max()) >= EFFECT


def test_adapter_that_the_program_has_no_room_for_is_refused(folder: Path, tmp_path: Path):
    other = adapted(rules(["layer.0.output", "embeddings"], r=3))
    with pytest.raises(ExportError, match="not a program for this adapter") as caught:
        export(other, tmp_path / "other.safetensors", "pt2", call_encoder(), program=folder / "model.pt2", trust=True)
    assert dict(caught.value.facts) == {
        "embeddings.lora_A.default.weight": "the program has no such parameter",
        "embeddings.lora_B.default.weight": "the program has no such parameter",
        "layer.0.output.lora_A.default.weight": "is [3, 64], in the program [2, 64]",
        "layer.0.output.lora_B.default.weight": "is [16, 3], in the program [16, 2]",
    }


def test_program_of_an_adapter_alone_is_read_with_trust_only(folder: Path, tmp_path: Path):
    other = adapted(rules("layer.1.**.{query,value}", r=3, alpha=30), 2)
    with pytest.raises(LoraFxError, match="is a program, and reading it can run any code"):
        export(other, tmp_path / "other.safetensors", "pt2", call_encoder(), program=folder / "model.pt2")
    assert not (tmp_path / "other.safetensors").exists()


def test_adapter_alone_needs_a_program(tmp_path: Path):
    with pytest.raises(ExportError, match=r"needs a program to go with\n  program='model.pt2'"):
        export(adapted(MIXED | {"rules": MIXED["rules"][:1]}), tmp_path / "other.safetensors", "pt2", call_encoder())


def test_file_holds_neither_the_example_nor_where_it_was_made(folder: Path):
    program = torch.export.load(folder / "model.pt2")
    assert program.example_inputs is None
    assert str(Path(__file__).parent).encode() not in (folder / "model.pt2").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_program_that_aotinductor_has_compiled(tmp_path: Path):
    exported = export(adapted(MIXED), tmp_path / "model.pt2", "pt2", call_encoder(3, 7), verify=True, compile=True)
    assert (tmp_path / "model.aoti.pt2").exists()
    assert exported.difference is not None
    assert exported.difference <= CLOSE < EFFECT <= exported.effect


@pytest.mark.slow
@each((LLAMA, BERT, UNET), fuzz=(VIT, DIT, T5))
@pytest.mark.filterwarnings("ignore")
def test_real_architectures(peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    sample = Sample((), peer.inputs(3, 7))
    exported = export(adapted_peer(peer, "modules"), tmp_path / "model.pt2", "pt2", sample, verify=True)
    assert_verified(exported)


def assert_verified(exported: Any) -> None:
    assert exported.difference is not None
    assert exported.difference <= exported.tolerance
    assert exported.effect >= EFFECT


UNTRACEABLE = ("loop over experts", "eager")
"""Kinds whose code depends on values: torch.export refuses their base too."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[::3], ids=lambda kind: kind.name)  # a third of them: torch.export takes its time
@pytest.mark.filterwarnings("ignore")
@pytest.mark.sampled(2)
def test_kinds_of_sites(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    tuned = kind.adapted()
    randomise_kind_(tuned)
    if any(word in kind.name for word in UNTRACEABLE):
        with pytest.raises(ExportError, match="cannot trace"):
            export(tuned, tmp_path / "model.pt2", "pt2", kind.sample())
    else:
        assert_verified(export(tuned, tmp_path / "model.pt2", "pt2", kind.sample(), verify=True))


def test_graph_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    torch.manual_seed(0)
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval())
    tuned = lora_fx.apply(traced, rules("**", alpha=3))
    randomise_(tuned)
    assert_verified(export(tuned, tmp_path / "model.pt2", "pt2", Sample((torch.randn(3, 8),)), verify=True))


def test_one_adapter_for_each_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).tanh())

    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    sample = Sample((torch.randn(3, 8),))
    chosen = {"version": 1, "rules": [{"match": {"name": "fc"}, "lora": {"r": 2}, "per_call": True}]}
    tuned = lora_fx.apply(Twice().eval(), chosen, sample, backend="modules")
    randomise_(tuned)
    assert_verified(export(tuned, tmp_path / "model.pt2", "pt2", sample, verify=True))
    assert len(load_file(tmp_path / "default.safetensors")) == 4


def test_parts_of_fused_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "run_client", lambda name, client: client())
    chosen = {
        "version": 1,
        "rules": [{"match": {"name": "0"}, "lora": {"r": 2}, "slices": {"of": ["q", "k", "v"], "adapt": ["q", "v"]}}],
    }
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(8, 12), nn.Tanh()), chosen, backend="modules")
    randomise_(tuned)
    assert_verified(export(tuned, tmp_path / "model.pt2", "pt2", Sample((torch.randn(3, 8),)), verify=True))
    assert not load_file(tmp_path / "default.safetensors")["0.lora_B.default.weight"][4:8].any()


def test_weights_that_accelerate_offloads_are_in_no_program_and_that_is_said(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    tuned = accelerate.cpu_offload(adapted(MIXED), execution_device="cpu")
    with pytest.raises(ExportError, match=r"layer\.0\.attention\.query +accelerate offloads its weights"):
        export(tuned, tmp_path / "model.pt2", "pt2", call_encoder(3, 7))
    assert list(tmp_path.iterdir()) == []
