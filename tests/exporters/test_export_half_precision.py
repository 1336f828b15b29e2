"""Exports of adapters in half precision: where a scaling goes into B, B is not rounded to half precision again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.exporters import diffusers, kohya, mlx, vllm
from lora_fx.exporters.base_graph import base_graph_parts
from lora_fx.exporters.plain import multiplied
from lora_fx.models.samples import Sample
from tests.support.exporting import rule, tuned_of, written
from tests.support.kinds import built
from tests.support.peers import LLAMA, UNET, Peer
from tests.support.zoo import Mlp

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
NEAR = 2e-7
"""Relative: a product rounded to float32 once.  Half precision would leave 4e-4 and more."""


def mixed(dtype: torch.dtype, alpha: float = 7) -> nn.Module:
    """Return an adapted model with two scalings, whose ratio is no power of two."""
    model = built(Mlp).to(dtype)
    return tuned_of(model, written(rule("fc1", r=3, alpha=alpha), rule("fc2", r=4, alpha=1)), None).to(dtype)


def kohya_file(tuned: nn.Module, folder: Path) -> dict[str, Tensor]:
    kohya.write(tuned, folder / "x.safetensors")
    held = load_file(folder / "x.safetensors")
    found = {}
    for path in ("fc1", "fc2"):
        down, up, alpha = (
            held[f"lora_unet_{path}.{name}"].double() for name in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        found[path] = up @ down * (alpha / len(down))
    return found


def mlx_file(tuned: nn.Module, folder: Path) -> dict[str, Tensor]:
    mlx.write(tuned, folder)
    held = load_file(folder / mlx.WEIGHTS)
    scale = json.loads((folder / mlx.CONFIG).read_text())["lora_parameters"]["scale"]
    return {path: (held[f"{path}.lora_a"].double() @ held[f"{path}.lora_b"].double()).mT * scale for path in PATHS}


def vllm_file(tuned: nn.Module, folder: Path) -> dict[str, Tensor]:
    vllm.write(tuned, folder, bake=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    held = load_file(folder / "adapter_model.safetensors")
    return products(held, "base_model.model.{}.lora_{}.weight", config["lora_alpha"] / config["r"])


def diffusers_file(tuned: nn.Module, folder: Path) -> dict[str, Tensor]:
    diffusers.write(tuned, folder, "transformer")
    return products(load_file(folder / diffusers.WEIGHTS), "transformer.{}.lora_{}.weight", 1.0)


PATHS = ("fc1", "fc2")
READERS: dict[str, Callable[[nn.Module, Path], dict[str, Tensor]]] = {
    "kohya": kohya_file,
    "mlx": mlx_file,
    "vllm": vllm_file,
    "diffusers": diffusers_file,
}


def products(held: dict[str, Tensor], name: str, scaling: float) -> dict[str, Tensor]:
    return {path: held[name.format(path, "B")].double() @ held[name.format(path, "A")].double() * scaling
            for path in PATHS}  # fmt: skip


def ours(tuned: nn.Module) -> dict[str, Tensor]:
    """Return scaling · B A in float64, of factors as they are."""
    return {
        path: adapter.lora_B.plain.double() @ adapter.lora_A.plain.double() * adapter.spec.scaling
        for path, adapter in all_attached(tuned)
    }


@HALVES
@pytest.mark.parametrize("target", READERS)
def test_what_a_file_says_is_the_adapter_to_the_last_digits_of_float32(target, dtype, tmp_path):
    tuned = mixed(dtype)
    for path, theirs in READERS[target](tuned, tmp_path).items():
        expected = ours(tuned)[path]
        assert (theirs - expected).abs().max() <= NEAR * expected.abs().max(), path


@pytest.mark.parametrize("target", READERS)
def test_rounding_once_more_would_be_seen(target, tmp_path, monkeypatch):
    for module in ("plain", "diffusers"):
        monkeypatch.setattr(f"lora_fx.exporters.{module}.multiplied", lambda factor, ratio: factor * ratio)
    tuned = mixed(torch.bfloat16)
    found, expected = READERS[target](tuned, tmp_path), ours(tuned)
    assert any((found[path] - expected[path]).abs().max() > 100 * NEAR * expected[path].abs().max() for path in PATHS)


def test_gguf_holds_what_is_left_of_a_scaling_unrounded(tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.support.ggufbase import language_model

    given = [rule("**.layers.0.mlp.up_proj", r=3, alpha=7), rule("**.layers.1.mlp.up_proj", r=3, alpha=2)]
    tuned = tuned_of(language_model("Llama"), written(*given), None).bfloat16()
    lora_fx.export(tuned, tmp_path / "x.gguf", "gguf")
    held = {one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    factor = tuned.get_submodule("model.layers.0.mlp.up_proj").lora_B.default.weight.detach()
    assert torch.equal(held["blk.0.ffn_up.weight.lora_b"], factor.float() * 3.5)
    assert not torch.equal(held["blk.0.ffn_up.weight.lora_b"], (factor * 3.5).float())


@HALVES
def test_factor_stays_in_half_precision_where_that_holds_the_product(dtype):
    factor = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert multiplied(factor, 1.0) is factor
    assert multiplied(factor, 0.5).dtype == dtype
    assert torch.equal(multiplied(factor, 0.5).float(), factor.float() / 2)
    assert torch.equal(multiplied(factor, 7 / 3), factor.float() * (7 / 3))
    tiny = torch.full((2, 2), torch.finfo(dtype).tiny, dtype=dtype)
    assert float(multiplied(tiny, 2.0**-20).min()) > 0, "what half precision would flush to zero or round"
    assert multiplied(factor.double(), 1 / 3).dtype == torch.float64


def test_graph_of_onnx_in_float32_takes_the_product_unrounded():
    tuned = mixed(torch.bfloat16)
    parts = base_graph_parts(tuned)
    for path, adapter in all_attached(tuned):
        written_B = parts.adapters["default"][f"{path}.lora_B.default.weight"]
        assert torch.equal(written_B, adapter.lora_B.plain.float() * adapter.spec.scaling), path


def test_kohyas_alpha_is_in_float32_whatever_the_default_dtype_is(tmp_path):
    tuned = mixed(torch.bfloat16, alpha=7.3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kohya.write(tuned, tmp_path / "x.safetensors")
    finally:
        torch.set_default_dtype(before)
    alpha = load_file(tmp_path / "x.safetensors")["lora_unet_fc1.alpha"]
    assert torch.equal(alpha, torch.tensor(7.3, dtype=torch.float32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("target", "peer", "client"),
    [
        ("kohya", LLAMA, "lycoris"),
        ("kohya", UNET, "diffusers"),
        ("diffusers", UNET, "diffusers"),
        ("mlx", LLAMA, "mlx_lm"),
        ("vllm", LLAMA, "peft"),
    ],
    ids=["kohya-lycoris", "kohya-diffusers", "diffusers", "mlx", "vllm"],
)
def test_clients_load_files_of_two_dtypes(target: str, peer: Peer, client: str, tmp_path):
    pytest.importorskip(client)
    names = ["**.{to_q,to_k,q_proj,k_proj}", "**.{to_v,to_out.0,v_proj,o_proj,net.2}"]
    given = [rule(names[0], r=3, alpha=7), rule(names[1], r=4, alpha=1)]
    tuned = tuned_of(peer.build(), written(*given), None).bfloat16()
    inputs = {key: one.bfloat16() if one.is_floating_point() else one for key, one in peer.inputs(2, 6).items()}
    options = {"bake": True} if target == "vllm" else {}
    path = tmp_path / ("x.safetensors" if target == "kohya" else "x")
    done = lora_fx.export(tuned, path, target, Sample((), inputs), verify=True, **options)
    held = load_file(next(tmp_path.rglob("*.safetensors")))
    assert {value.dtype for value in held.values()} >= {torch.bfloat16, torch.float32}
    assert done.difference is not None
    assert done.difference < done.effect / 3, "near ours, and further from the base"
