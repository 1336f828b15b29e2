"""Files of PiSSA and OLoRA: plain adapters of rank 2r for the base itself, and those of PEFT that are not."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.errors import AdapterFileError, MergeError
from tests.adapters.test_moved import Pair, X, rules, trained

peft = pytest.importorskip("peft")
INITS = ("pissa", "olora")


def theirs(base: nn.Module, init: str, **settings: object) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["a", "b"], init_lora_weights=init, **settings)
    return peft.get_peft_model(copy.deepcopy(base), config)


def trained_by_peft(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("init", INITS)
def test_first_values_and_three_steps_are_those_of_peft(init):
    base = Pair()
    other = theirs(base, init)
    tuned = lora_fx.apply(base, rules(init), (X,))
    own = dict(tuned.named_parameters())
    for name, parameter in other.base_model.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(own[name], parameter)
    trained(tuned)
    trained_by_peft(other)
    torch.testing.assert_close(tuned(X), other(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", [*INITS, "pissa_niter_2"])
def test_a_saved_adapter_comes_back_bit_by_bit_and_is_plain_for_peft(init, tmp_path):
    base = Pair()
    tuned = trained(lora_fx.apply(base, rules(init), (X,)))
    lora_fx.save(tuned, tmp_path / "first")
    again = lora_fx.load(base, tmp_path / "first", (X,))
    mine, read = tuned.state_dict(), again.state_dict()
    assert mine.keys() == read.keys()
    assert all(torch.equal(mine[name], read[name]) for name in mine)
    assert torch.equal(again(X), tuned(X))
    lora_fx.save(again, tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    config = json.loads((tmp_path / "first/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first")
    torch.testing.assert_close(loaded(X), tuned(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trained(again)(X), trained(tuned)(X), rtol=0, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_rank_stabilised_scaling_is_that_of_r_not_of_the_files_rank(rslora, tmp_path):
    base = Pair()
    tuned = trained(lora_fx.apply(base, rules(rslora=rslora), (X,)))
    lora_fx.save(tuned, tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(loaded(X), tuned(X), rtol=1e-5, atol=1e-5)
    assert torch.equal(lora_fx.load(base, tmp_path)(X), lora_fx.load(base, tmp_path, (X,))(X))


@pytest.mark.parametrize("init", INITS)
def test_what_peft_wrote_unconverted_is_read_as_peft_reads_it(init, tmp_path):
    base = Pair()
    trained_by_peft(theirs(base, init)).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    tuned = lora_fx.load(base, tmp_path, (X,))
    torch.testing.assert_close(tuned(X), loaded(X), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(tuned(X), base(X), atol=1e-3)
    assert [adapter.spec.lora.init for _, adapter in all_attached(tuned)] == [init, init]
    torch.testing.assert_close(lora_fx.merge(tuned)(X), loaded(X), rtol=1e-5, atol=1e-5)
    lora_fx.save(tuned, tmp_path / "plain")
    assert torch.equal(lora_fx.load(base, tmp_path / "plain", (X,))(X), tuned(X))


def test_what_peft_has_converted_is_plain(tmp_path):
    base = Pair()
    other = theirs(base, "pissa_niter_2")
    other.save_pretrained(tmp_path / "start")
    config = json.loads((tmp_path / "start/adapter_config.json").read_text())
    (tmp_path / "start/adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    trained_by_peft(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(lora_fx.load(base, tmp_path / "done", (X,))(X), other(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "lora_ga", "loftq"])
def test_what_cannot_be_found_again_is_refused_and_says_why(init, tmp_path):
    base = Pair()
    theirs(base, "pissa").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": init}))
    with pytest.raises(AdapterFileError, match="trained on what is left of the base"):
        lora_fx.load(base, tmp_path)


def test_what_needs_its_base_is_not_audited_or_merged_without_it(tmp_path):
    from safetensors.torch import save_file

    base = Pair()
    trained_by_peft(theirs(base, "olora")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="load it onto its base"):
        lora_fx.audit(tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    with pytest.raises(MergeError, match="rest of the base"):
        lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_merged_with_a_saved_adapter(tmp_path):
    from safetensors.torch import save_file

    base = Pair()
    tuned = trained(lora_fx.apply(base, rules(), (X,)))
    lora_fx.save(tuned, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file(base.state_dict(), tmp_path / "base/model.safetensors")
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    whole = lora_fx.merge(tuned).state_dict()
    for name, value in merged.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    row = next(iter(lora_fx.audit(tmp_path / "adapter").sites))
    assert row.r == 4
