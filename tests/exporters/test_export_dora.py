"""DoRA of all kinds of weights in every target: written so that its client computes the same, or refused by name."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.exporters import target_named
from lora_fx.models.samples import Sample
from tests.support import kinds
from tests.support.exporting import Fused, X, rule, tuned_of, written
from tests.support.peers import LLAMA, UNET

pytestmark = pytest.mark.filterwarnings("ignore")
LIMIT = 1e-5
PARTS = {"of": ["q", "k", "v"], "adapt": ["q", "v"]}
KINDS = {
    "convolution": (kinds.Convolutions, [rule("{line,plane,space}", dora=True)], kinds.Convolutions.inputs),
    "groups": (functools.partial(kinds.Padded, groups=2), [rule("conv", dora=True)], kinds.Padded.inputs),
    "embedding": (kinds.Tokens, [rule("words", dora=True)], kinds.Tokens.inputs),
    "slices": (Fused, [rule("qkv", slices=PARTS, dora=True)], X),
    "parameter": (kinds.Matrices, [rule("{first,pair}.*", dora=True)], kinds.Matrices.inputs),
    "attention": (kinds.Attention, [rule("mha.in_proj_weight", dora=True)], kinds.Attention.inputs),
}


@functools.cache
def specimen(kind: str) -> tuple[nn.Module, Sample]:
    make, chosen, inputs = KINDS[kind]
    return tuned_of(kinds.built(make), written(*chosen), inputs), lora_fx.call(*inputs)


def verified(tuned: nn.Module, sample: Sample, target: str, path: Path) -> float:
    for name in target_named(target).verify_needs:
        pytest.importorskip(name)
    result = lora_fx.export(tuned, path, target, sample, verify=True)
    assert result.effect > 10 * LIMIT
    assert result.difference is not None
    return result.difference


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_hold_it(kind: str, tmp_path):
    assert verified(*specimen(kind), "merged", tmp_path / "x.safetensors") < LIMIT


@pytest.mark.parametrize("kind", ["convolution", "groups", "embedding", "slices"])
def test_peft_computes_the_same(kind: str, tmp_path):
    assert verified(*specimen(kind), "peft", tmp_path / "x") < LIMIT


@pytest.mark.parametrize("kind", ["parameter"])
def test_peft_has_none_of_raw_parameters(kind: str, tmp_path):
    with pytest.raises(ExportError, match=r"first\.w +it is DoRA of a raw parameter"):
        lora_fx.export(specimen(kind)[0], tmp_path / "x", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_program_of_torch_computes_the_same(kind: str, tmp_path):
    assert verified(*specimen(kind), "pt2", tmp_path / "x.pt2") < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_the_same(kind: str, tmp_path):
    pytest.importorskip("onnxscript")
    assert verified(*specimen(kind), "onnx", tmp_path / "x.onnx") < LIMIT


@pytest.mark.slow
def test_diffusers_computes_the_same_with_convolutions(tmp_path):
    chosen = written(rule("**.{conv1,conv2,conv_in}", dora=True), rule("**.to_q", r=2, alpha=7, dora=True))
    tuned = tuned_of(UNET.build(), chosen, None)
    assert verified(tuned, Sample((), UNET.inputs(2, 5)), "diffusers", tmp_path / "x") < LIMIT


@pytest.mark.parametrize("kind", ["convolution", "slices"])
def test_lycoris_computes_the_same(kind: str, tmp_path):
    assert verified(*specimen(kind), "kohya", tmp_path / "x.safetensors") < LIMIT
    tensors = load_file(tmp_path / "x.safetensors")
    lengths = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("dora_scale")}
    shapes = {"line": (6, 1, 1), "plane": (8, 1, 1, 1), "space": (4, 1, 1, 1, 1), "qkv": (24, 1)}
    names = ["line", "plane", "space"] if kind == "convolution" else ["qkv"]
    assert lengths == {f"lora_unet_{name}.dora_scale": shapes[name] for name in names}


def test_kohya_of_a_unet_is_refused_since_diffusers_drops_the_lengths(tmp_path):
    tuned = tuned_of(UNET.build(), written(rule("**.to_q", dora=True)), None)
    with pytest.raises(ExportError, match="diffusers leaves out the `dora_scale` of a file of a UNet or CLIP"):
        lora_fx.export(tuned, tmp_path / "x.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


def test_lengths_of_an_embedding_are_others_in_mlx_and_are_refused(tmp_path):
    model = LLAMA.build()
    tuned = tuned_of(model, written(rule("**.embed_tokens", dora=True)), None)
    with pytest.raises(ExportError, match="has a length for each token, not for each dimension"):
        lora_fx.export(tuned, tmp_path / "x", "mlx")
    assert not list(tmp_path.iterdir())
    assert torch.is_tensor(model.get_parameter("model.embed_tokens.weight"))
