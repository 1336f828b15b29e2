"""ExecuTorch: one file with the adapted model and its base, run by the portable runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("executorch")

import lora_fx
from lora_fx.exporters import Exported, executorch, export
from lora_fx.models.samples import Sample
from tests.adapters.test_site_kinds import KINDS
from tests.support.peers import BERT, DIT, LLAMA, VIT, Peer, each
from tests.support.peers import adapted as adapted_peer
from tests.support.programs import CLOSE, EFFECT, MIXED, adapted
from tests.support.sitekinds import randomise_ as randomise_kind_
from tests.support.zoo import call_encoder, randomise_, rules

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def assert_verified(exported: Exported) -> None:
    assert exported.difference is not None
    assert exported.difference <= exported.tolerance
    assert exported.effect >= EFFECT


def test_adapters_of_several_ranks_and_scalings_with_rslora_dora_and_modules_trained_whole(tmp_path: Path):
    exported = export(adapted(MIXED), tmp_path / "model.pte", "executorch", call_encoder(3, 7), verify=True)
    assert_verified(exported)


@each((LLAMA,), fuzz=(VIT, BERT, DIT))
def test_real_architectures(peer: Peer, tmp_path: Path):
    # half a minute of conversion for each two blocks
    one = {} if peer is DIT else {"num_hidden_layers": 1}
    tuned, sample = adapted_peer(peer, "modules", **one), Sample((), peer.inputs(3, 7))
    assert_verified(export(tuned, tmp_path / "model.pte", "executorch", sample, verify=True))


KINDS_TESTED = (
    "Conv1D of transformers", "conv1d groups", "conv2d plain", "conv2d circular", "embedding, padding", "shared",
    "x @ w", "bmm with a bank", "chunked", "F.embedding", "self-attention", "encoder layer", "all experts at once",
    "Mixtral, batched_mm",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS_TESTED)
@pytest.mark.sampled(2)
def test_kinds_of_sites(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(executorch, "run_client", lambda name, client: client())
    (kind,) = (one for one in KINDS if one.name == name)
    tuned = kind.adapted()
    randomise_kind_(tuned)
    assert_verified(export(tuned, tmp_path / "model.pte", "executorch", kind.sample(), verify=True))


def test_methods_share_their_weights_and_take_smaller_inputs(tmp_path: Path):
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(512, 512), nn.Tanh()), rules("0"), backend="modules").eval()
    randomise_(tuned)
    export(tuned, tmp_path / "model.pte", "executorch", Sample((torch.randn(8, 512),)))
    assert (tmp_path / "model.pte").stat().st_size < 1.5 * 512 * 512 * 4
    program = Runtime.get().load_program(tmp_path / "model.pte")
    assert sorted(program.method_names) == ["base", "forward"]
    x = torch.randn(3, 512)
    with torch.no_grad():
        (result,) = program.load_method("forward").execute([x])
        torch.testing.assert_close(result, tuned(x), rtol=CLOSE, atol=CLOSE)
        with lora_fx.disabled(tuned):
            (result,) = program.load_method("base").execute([x])
            torch.testing.assert_close(result, tuned(x), rtol=CLOSE, atol=CLOSE)
