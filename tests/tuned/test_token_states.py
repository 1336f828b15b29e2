"""A state says of which tokens its rows are: rows of others are refused by name, whoever reads them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import lora_fx
from tests.support.wordmodels import BACKENDS, IDS, WORDS, fill, model, rows_in, rules, trained

OTHERS = [3, 8, 11]
KEY = "words.lora_trained.default.weight._extra_state"


def all_equal(tuned, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())


def read_again(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@BACKENDS
def test_rows_of_other_tokens_are_refused_and_those_of_the_same_are_read(inputs):
    source = trained(inputs)
    whole, own = read_again(source.state_dict()), read_again(lora_fx.adapter_state(source))
    assert whole[KEY].tolist() == own[KEY].tolist() == IDS
    assert own.keys() <= whole.keys()
    for other in (trained(inputs, given=rules(OTHERS)), copy.deepcopy(trained(inputs, given=rules(OTHERS)))):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(lora_fx.AdapterMismatchError, match=r"tokens 3, 7, 11 .*tokens 3, 8, 11"):
            lora_fx.load_adapter_state(other, own)
        assert all_equal(other, before)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=r"tokens 3, 7, 11 in the place of those of 3, 8, 11"):
                other.load_state_dict(whole, strict=strict)
        assert all(torch.equal(rows, before[name]) for name, rows in rows_in(other).items())
    for load in (lambda tuned: lora_fx.load_adapter_state(tuned, own), lambda tuned: tuned.load_state_dict(whole)):
        same = trained(inputs)
        fill(same, seed=9)
        load(same)
        assert torch.equal(same(WORDS), source(WORDS))


def test_a_state_that_tells_no_ids_is_refused():
    tuned = trained()
    own, whole = lora_fx.adapter_state(tuned), tuned.state_dict()
    for state in (own, whole):
        state.pop(KEY)
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"_extra_state"):
        lora_fx.load_adapter_state(tuned, own)
    with pytest.raises(RuntimeError, match=r"Missing key.*_extra_state"):
        tuned.load_state_dict(whole)
    with pytest.raises(RuntimeError, match="that it does not tell"):
        tuned.load_state_dict({**whole, KEY: torch.tensor(IDS, device="meta")})


def test_models_without_such_rows_have_the_keys_they_had():
    plain = lora_fx.apply(model(), {"rules": rules()["rules"]}, backend="modules")
    assert not any("_extra_state" in name for name in (*plain.state_dict(), *lora_fx.adapter_state(plain)))
    tuned = trained()
    for base in (lora_fx.merge(tuned), lora_fx.remove(tuned)):
        assert list(base.state_dict()) == list(model().state_dict())


def test_ids_go_with_their_adapter_and_with_copies():
    tuned = trained()
    lora_fx.add(tuned, rules(OTHERS), adapter="b")
    assert lora_fx.adapter_state(tuned, "b")[KEY.replace("default", "b")].tolist() == OTHERS
    assert KEY not in lora_fx.adapter_state(tuned, "b")
    lora_fx.rename(tuned, "b", "c")
    for copied in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned)), tuned.to(torch.float64)):
        assert copied.state_dict()[KEY.replace("default", "c")].tolist() == OTHERS
    lora_fx.drop(tuned, "c")
    assert [name for name in tuned.state_dict() if name.endswith("_extra_state")] == [
        KEY, KEY.replace("words", "head"),
    ]  # fmt: skip
    on_meta = lora_fx.apply(model().to("meta"), rules(), backend="modules").to_empty(device="cpu")
    assert on_meta.state_dict()[KEY].tolist() == IDS


def test_checkpoints_of_lightning_with_rows_of_other_tokens_change_nothing(tmp_path):
    lightning = pytest.importorskip("lora_fx.integrations.lightning", exc_type=ImportError)
    torch.save({"state_dict": trained(given=rules(OTHERS)).state_dict()}, tmp_path / "other.ckpt")
    tuned = trained()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"tokens \[3, 8, 11\] .*tokens \[3, 7, 11\]"):
        lightning.load_adapter_checkpoint(tuned, tmp_path / "other.ckpt")
    assert all_equal(tuned, before)
