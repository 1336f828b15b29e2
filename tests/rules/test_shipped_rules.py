"""The rule files that come with lora_fx: what each adapts and keeps, by name, in well-known models."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from lora_fx.rules import shipped
from lora_fx.rules.reader import read_rules

ROOT = Path(__file__).parents[2]
PAGES = [str(path.relative_to(ROOT / "lora_fx")) for path in (ROOT / "lora_fx").rglob("*.html")]
CASES = Path(__file__).parents[1] / "golden" / "rules"
MODELS = yaml.safe_load((CASES / "models.yaml").read_text(encoding="utf-8"))


def cases(name: str) -> dict[str, dict[str, list[str]]]:
    return yaml.safe_load((CASES / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", shipped.names())
def test_shipped_rules_adapt_and_keep_what_their_test_says(name, model):
    rules = read_rules(name)
    expected = cases(name)[model]
    adapted = []
    for path, shape in MODELS[model].items():
        first = next(
            (r for r in rules.rules if not r.match.explain((path,), tuple(shape), "linear", ("Linear",))), None
        )
        if first is not None and first.lora is not None:
            adapted.append(path)
    assert adapted == expected["adapts"]
    assert [path for path in MODELS[model] if path not in adapted] == expected["keeps"]


def test_every_shipped_file_has_a_test_and_every_test_a_file():
    assert {path.stem for path in CASES.glob("*.yaml")} - {"models"} == set(shipped.names())


@pytest.mark.parametrize("spelling", ["attention", "attention.yaml", "rules/attention.yaml"])
def test_shipped_file_is_found_by_its_name_as_by_its_path(spelling, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [rule.match for rule in read_rules(spelling).rules] == [
        rule.match for rule in read_rules(str(ROOT / "rules" / "attention.yaml")).rules
    ]


def test_users_own_file_comes_before_a_shipped_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "attention").write_text("version: 1\nrules: [{name: mine, match: {name: a}}]\n")
    assert read_rules("attention").rules[0].name == "mine"


@pytest.mark.slow
def test_wheel_holds_the_shipped_rules_the_pages_the_type_marker_and_no_tests(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"lora_fx/shipped_rules/{name}.yaml" for name in shipped.names()} <= held
    assert "lora_fx/shipped_rules/lora-fx.schema.json" in held
    assert {f"lora_fx/{name}" for name in ("py.typed", *PAGES)} <= held
    assert "lora_fx/pages/errors.md" in held
    assert not any(name.startswith(("tests/", "demo/")) for name in held)
    assert wheel.stat().st_size < 1_250_000


def _whisper():
    from transformers import WhisperConfig, WhisperModel

    return WhisperModel(
        WhisperConfig(
            d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
    )  # fmt: skip


def _mamba():
    from transformers import MambaConfig, MambaModel

    return MambaModel(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4))


def _deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
            q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, vocab_size=64,
            first_k_dense_replace=1,
        )
    )  # fmt: skip


def _modernbert():
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    return ModernBertForSequenceClassification(
        ModernBertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                         vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    )  # fmt: skip


def _flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=16,
        pos_embed_max_size=8,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make", "library"),
    [("whisper", _whisper, "transformers"), ("mamba", _mamba, "transformers"), ("deepseek", _deepseek, "transformers"),
     ("modernbert", _modernbert, "transformers"), ("flux", _flux, "diffusers"), ("sd3", _sd3, "diffusers")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_models_of_the_tests_have_the_names_that_their_library_gives_them(name, make, library):
    pytest.importorskip(library)
    import torch

    with torch.device("meta"):
        model = make()
    linears = ((path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    assert {path: list(module.weight.shape) for path, module in linears} == MODELS[name]
