"""What the clients of exports do otherwise than one would guess: each shown beside what lora_fx does.

A test that shows a client's own behaviour fails where it has been repaired: `docs/clients.md` then says too much.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import exporters
from lora_fx.discovery.study import Observed
from lora_fx.errors import ExportError
from lora_fx.exporters import clients, target_named
from lora_fx.exporters.running import outputs_of
from lora_fx.models.samples import Sample
from tests.support.exporting import rule, tuned_of, written

pytestmark = pytest.mark.filterwarnings("ignore")
CLOSE, EFFECT = 1e-5, 1e-2
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for each client, and no graphs: they take most of the time, and change no value."""
    for name in exporters.BUILT_IN:
        monkeypatch.setattr(f"lora_fx.exporters.{name}.run_client", lambda _, client: client(), raising=False)
    planned = Observed.planned
    monkeypatch.setattr(Observed, "planned", lambda seen, decisions, backend="": planned(seen, decisions, "modules"))


def exported(tuned: nn.Module, path: Path, target: str, sample: Sample, **options: Any) -> exporters.Exported:
    """Return what verifying in the real client has shown; skip where it is not installed."""
    for name in target_named(target).verify_needs:
        pytest.importorskip(name)
    return lora_fx.export(tuned, path, target, sample, verify=True, **options)


def assert_right(exported: exporters.Exported) -> None:
    assert exported.difference is not None
    assert exported.difference <= exported.tolerance < EFFECT <= exported.effect


# -- an alpha of 0 is a scale of 0 in PEFT, and of 1 in llama.cpp and LyCORIS


def with_alpha_0(folder: Path, model: nn.Module, alphas: dict[str, Any]) -> nn.Module:
    """Return what is loaded of an adapter of PEFT's with these alphas."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **alphas)
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return lora_fx.load(model, folder)


ALPHAS = {
    "one": {"lora_alpha": 8, "alpha_pattern": {"q_proj": 0}},
    "most": {"lora_alpha": 0, "alpha_pattern": {"q_proj": 8}},
}


@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
@pytest.mark.parametrize("target", ["kohya", "mlx", "vllm"])
def test_alpha_0_is_an_adapter_without_effect(target, alphas, tmp_path):
    from tests.support.peers import LLAMA

    tuned = with_alpha_0(tmp_path / "peft", LLAMA.build(initializer_range=0.3), alphas)
    assert_right(exported(tuned, tmp_path / "x", target, Sample((), LLAMA.inputs(2, 6))))


@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
def test_alpha_0_is_an_adapter_without_effect_in_llama_cpp(alphas, tmp_path):
    pytest.importorskip("xllamacpp")
    from tests.support.ggufbase import language_model, prompts, write_base

    write_base("Llama", language_model("Llama"), tmp_path / "base.gguf")
    tuned = with_alpha_0(tmp_path / "peft", language_model("Llama"), alphas)
    export = exported(tuned, tmp_path / "x.gguf", "gguf", Sample((), prompts()), base=tmp_path / "base.gguf")
    assert export.difference is not None
    assert export.difference <= export.tolerance < export.effect


def test_lycoris_takes_alpha_0_for_1_and_keeps_the_scale_that_it_was_made_with():
    locon = pytest.importorskip("lycoris.modules.locon")
    layer = nn.Linear(8, 8)
    made = locon.LoConModule("x", layer, lora_dim=4, alpha=2)
    assert locon.LoConModule("x", layer, lora_dim=4, alpha=0).scale == 1
    made.load_state_dict({**made.state_dict(), "alpha": torch.tensor(8.0)})
    assert (float(made.alpha), made.scale) == (8.0, 0.5)


# -- diffusers


def text_encoder(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes, **ids, projection_dim=24)).eval()


TOKENS = Sample((torch.tensor([[5, 9, 30, 2], [7, 3, 61, 2]]),))
TEXT = {
    "q and v": [rule("**.q_proj", r=4, alpha=8), rule("**.v_proj", r=2, alpha=8)],
    "q, v and an mlp": [rule("**.{q_proj,v_proj,fc1}", r=4, alpha=8)],
    "all of attention": [rule("**.self_attn.*", r=4, alpha=8)],
    "an mlp": [rule("**.fc*", r=4, alpha=8)],
}


@pytest.mark.parametrize("chosen", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_diffusers_reads_every_layer_of_a_text_encoder(kind, chosen, tmp_path):
    pytest.importorskip("diffusers")
    tuned = tuned_of(text_encoder(kind), written(*chosen), None)
    assert_right(exported(tuned, tmp_path / "x.safetensors", "kohya", TOKENS))
    prefix = "lora_te2" if "Projection" in kind else "lora_te1"
    assert all(key.startswith(f"{prefix}_text_model_encoder_") for key in load_file(tmp_path / "x.safetensors"))


def test_diffusers_drops_q_and_v_of_a_text_encoder_without_out_proj(tmp_path):
    pytest.importorskip("diffusers")
    path = tmp_path / "x.safetensors"
    for name in ("q and v", "q, v and an mlp"):
        tuned = tuned_of(text_encoder("CLIPTextModel"), written(*TEXT[name]), None)
        lora_fx.export(tuned, path, "kohya")
        given = load_file(path)
        zeros = [key for key in given if "out_proj" in key]
        assert zeros == [f"lora_te1_text_model_encoder_layers_0_self_attn_out_proj.{end}" for end in ENDS]
        assert not given[zeros[2]].any()
        save_file({key: value for key, value in given.items() if key not in zeros}, path)
        load = (text_encoder("CLIPTextModel"), path, "text_encoder", (TOKENS.args, {}))
        if name == "q and v":
            with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
                clients.diffusers(*load)
        else:
            _, (adapted, *_) = clients.diffusers(*load)
            assert float((adapted - outputs_of(tuned, TOKENS)[0]).abs().max()) > EFFECT


ENDS = ("alpha", "lora_down.weight", "lora_up.weight")


def test_layers_that_diffusers_drops_from_kohya_files_are_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "block_out_channels": (16, 16),
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    }
    settings |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1, "sample_size": 8}
    settings |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time"}
    settings |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16, "time_cond_proj_dim": 8}
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**settings).eval()
    every = {
        "version": 1,
        "rules": [{"match": {"name": "**", "op": ["linear", "conv2d"]}, "lora": {"r": 2, "alpha": 3}}],
    }
    tuned = tuned_of(unet, every, None)
    dropped = ["add_embedding.linear_1", "add_embedding.linear_2", "time_embedding.cond_proj"]
    with pytest.raises(ExportError, match="diffusers drops it") as caught:
        lora_fx.export(tuned, tmp_path / "x.safetensors", "kohya")
    assert sorted(path for path, _ in caught.value.facts) == dropped
    text = text_encoder("CLIPTextModelWithProjection")
    with pytest.raises(ExportError, match=r"text_projection +diffusers drops it"):
        lora_fx.export(tuned_of(text, written(rule("text_projection")), None), tmp_path / "x", "kohya")
    skipped = [{"match": {"name": dropped}, "skip": "diffusers drops it"}, *every["rules"]]
    tuned = tuned_of(unet, {**every, "rules": skipped}, None)
    added = {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 2)}
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5]), "added_cond_kwargs": added}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 16)
    assert_right(exported(tuned, tmp_path / "x.safetensors", "kohya", Sample((), inputs)))


def test_attention_and_convolution_of_unlike_scalings_are_read_alike(tmp_path):
    from tests.support.peers import UNET

    chosen = written(rule("**.to_q", r=2, alpha=7), rule("**.{conv1,to_v}", r=4, alpha=1))
    tuned = tuned_of(UNET.build(), chosen, None)
    assert_right(exported(tuned, tmp_path / "x.safetensors", "kohya", Sample((), UNET.inputs(2, 5))))


def test_component_that_is_not_known_is_asked_for_as_diffusers_passes_over_others(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (16,), "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 8}
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "conditioning_embedding_out_channels": (4,)}
    torch.manual_seed(0)
    control = diffusers.ControlNetModel(**sizes, **kinds, layers_per_block=1).eval()
    tuned = tuned_of(control, written(rule("**.to_q", r=2, alpha=7)), None)
    with pytest.raises(ExportError, match=r"what pipelines call a ControlNetModel is not known\n  give component="):
        lora_fx.export(tuned, tmp_path / "x", "diffusers")
    lora_fx.export(tuned, tmp_path / "x", "diffusers", component="controlnet")
    given = load_file(tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("controlnet.") for key in given)
    control.load_lora_adapter(given, prefix="unet")
    assert not any("lora" in name for name, _ in control.named_parameters()), "it loads, and nothing happens"


# -- mlx-lm


def test_mlx_lm_refuses_surplus_keys_and_is_silent_on_missing_ones(tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    from tests.support.peers import LLAMA

    model = LLAMA.build()
    model.save_pretrained(tmp_path / "base")
    tuned = tuned_of(model, written(rule("**.q_proj"), rule("**.layers.1.**.up_proj", r=2)), None)
    sample = Sample((), LLAMA.inputs(2, 6))
    assert_right(exported(tuned, tmp_path / "x", "mlx", sample))
    path = tmp_path / "x" / "adapters.safetensors"
    given = load_file(path)
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert sorted(given) == sorted(
        f"{key}.{end}" for key in config["lora_parameters"]["keys"] for end in ("lora_a", "lora_b")
    )
    for wrong, why in ((given | {"lm_head.lora_a": X}, "incompatible tensors"), (dict([*given.items()][1:]), "lacks")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=why):
            clients.mlx(tmp_path / "base", tmp_path / "x", sample.kwargs["input_ids"])
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    load_adapters(load_model(tmp_path / "base")[0], str(tmp_path / "x"))  # without a word, and without the first
