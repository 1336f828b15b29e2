"""Models as transformers loads them with compressed-tensors: the checkpoint stays what it is, and is written again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.codedmodels import INT4, compress_, copied
from tests.support.sitekinds import randomise_

transformers = pytest.importorskip("transformers")
compressors = pytest.importorskip("compressed_tensors.compressors")

IDS = torch.arange(8)[None]
RULES = {"version": 1, "rules": [{"match": {"name": ["**.q_proj", "**.v_proj", "**.down_proj"]}, "lora": {"r": 4}}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, tie_word_embeddings=False, **settings)
    model, folder = transformers.LlamaForCausalLM(config), tmp_path_factory.mktemp("w4a16")
    compress_(model, INT4)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def loaded(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_from_a_checkpoint_to_a_merged_one_and_to_one_that_is_quantised_again(checkpoint: Path, tmp_path: Path):
    model = loaded(checkpoint)
    keys = list(model.state_dict())
    expected = copied(model)(IDS).logits
    tuned = lora_fx.apply(model, RULES, {"input_ids": IDS})
    assert torch.equal(tuned(IDS).logits, expected)
    assert "graph" in {site.backend for site in lora_fx.inspect(tuned).sites}
    optimizer = torch.optim.AdamW(lora_fx.parameters(tuned.train()), 1e-2)
    losses = []
    for _ in range(5):
        loss = tuned(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    randomise_(tuned.eval(), 0.1)
    wanted = tuned(IDS).logits
    lora_fx.save(tuned, tmp_path / "adapter")
    assert torch.equal(lora_fx.load(loaded(checkpoint), tmp_path / "adapter")(IDS).logits, wanted)
    for backend in ("graph", "modules"):
        other = lora_fx.apply(model, RULES, {"input_ids": IDS}, backend=backend)
        lora_fx.load_adapter_state(other, lora_fx.adapter_state(tuned))
        assert torch.equal(other(IDS).logits, wanted)
    assert list(model.state_dict()) == keys
    assert hasattr(model, "ct_decompress_hook"), "the model that was given has not been decompressed"
    assert "weight_packed" in dict(model.model.layers[0].self_attn.q_proj.named_parameters())
    with pytest.warns(lora_fx.LoraFxWarning):
        again = lora_fx.merge(tuned, requantize="same")
    again.save_pretrained(tmp_path / "again")
    read = loaded(tmp_path / "again")
    assert torch.equal(read(IDS).logits, again(IDS).logits), "compressed, as it was"
    assert 0 < (again(IDS).logits - wanted).norm() < 0.3 * wanted.norm()


def test_all_that_is_quantised_merged_gives_a_plain_checkpoint(checkpoint: Path, tmp_path: Path):
    model = loaded(checkpoint)
    rules = {"version": 1, "rules": [{"match": {"name": "**.*_proj"}, "lora": {"r": 2}}]}
    tuned = lora_fx.apply(model, rules, {"input_ids": IDS})
    randomise_(tuned, 0.1)
    merged = lora_fx.merge(tuned)
    assert not hasattr(merged.config, "quantization_config")
    merged.save_pretrained(tmp_path)
    read = loaded(tmp_path)
    assert torch.equal(read(IDS).logits, merged(IDS).logits)
    assert (merged(IDS).logits - tuned(IDS).logits).norm() <= 1e-4 * merged(IDS).logits.norm()
