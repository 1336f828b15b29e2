"""Every way in which an adapter's files can be wrong, or not fit a model: a clear error, and nothing changes."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from lora_fx.files.adapter.names import CONFIG_FILE, METADATA_KEY, WEIGHTS_FILE
from tests.files.adapter.test_adapter_files import adapted, model
from tests.support import zoo


@pytest.fixture
def saved(tmp_path):
    lora_fx.save(adapted(), tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    """Let `change` alter the tensors; the file is then written as PEFT would, without lora_fx's header."""
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def reconfigure(folder, **values) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | values
    (folder / CONFIG_FILE).write_text(json.dumps(config))


FIRST = "base_model.model.layer.0.attention.query.lora_A.weight"
FIRST_B = "base_model.model.layer.0.attention.query.lora_B.weight"


def truncated(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content[:-100])


def four_bytes(folder) -> None:
    (folder / WEIGHTS_FILE).write_bytes(b"\x00\x01\x02\x03")


def flipped(folder) -> None:
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-5] ^= 0x10
    (folder / WEIGHTS_FILE).write_bytes(content)


def flipped_header(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content.replace(b'\\"dropout\\":0.0', b'\\"dropout\\":0.4', 1))


def flipped_key(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(content.replace(METADATA_KEY.encode(), b"lora_fy", 1))


def huge_header(folder) -> None:
    content = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 2**40) + content[8:])


def no_weights(folder) -> None:
    (folder / WEIGHTS_FILE).unlink()


def a_pickle(folder) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(b"")


def no_config(folder) -> None:
    (folder / CONFIG_FILE).unlink()


def cut_config(folder) -> None:
    (folder / CONFIG_FILE).write_text('{"peft_type": "LO')


def other_kind(folder) -> None:
    reconfigure(folder, peft_type="LOHA")


def other_rank(folder) -> None:
    rewrite(folder, lambda tensors: None)
    reconfigure(folder, r=16)


def other_alpha(folder) -> None:
    reconfigure(folder, lora_alpha=99)


def lost_factor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.pop(FIRST_B))


def extra_tensor(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.layer.0.unknown": torch.zeros(2)}))


def not_a_number(folder) -> None:
    rewrite(folder, lambda tensors: tensors[FIRST][0].fill_(float("nan")))


def infinite(folder) -> None:
    rewrite(folder, lambda tensors: tensors[FIRST][0].fill_(float("inf")))


def wrong_bias(folder) -> None:
    key = "base_model.model.layer.0.attention.query.base_layer.bias"
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(3)}))


def do_not_multiply(folder) -> None:
    rewrite(folder, lambda tensors: tensors.update({FIRST_B: torch.zeros(16, 5)}))


def pissa(folder) -> None:
    reconfigure(folder, init_lora_weights="pissa")


def corda(folder) -> None:
    reconfigure(folder, init_lora_weights="corda")


def replicated(folder) -> None:
    reconfigure(folder, layer_replication=[[0, 2], [1, 3]])


WRONG_FILES = {
    truncated: "cannot be read",
    four_bytes: "cannot be read",
    flipped: "is damaged: its contents have changed since they were written",
    flipped_header: "is damaged: its contents have changed since they were written",
    flipped_key: "lora_fx  is spelt 'lora_fy'",
    huge_header: "cannot be read",
    no_weights: "does not exist",
    a_pickle: "a pickle, which is not read",
    no_config: "does not exist",
    cut_config: "is not JSON",
    other_kind: "is not the configuration of a LoRA adapter",
    other_rank: "has rank 4, adapter_config.json says 16",
    other_alpha: "contradicts adapter_config.json at layer.0.attention.query",
    lost_factor: f"{FIRST_B}  is missing",
    extra_tensor: "base_model.model.layer.0.unknown  is of no kind that lora_fx knows",
    not_a_number: "has NaN or infinite values",
    infinite: "has NaN or infinite values",
    wrong_bias: "query.base_layer.bias  has shape [3], not [16]",
    do_not_multiply: "lora_A [4, 16] and lora_B [16, 5] do not multiply",
    pissa: "contradicts adapter_config.json, by which the base is another",
    corda: "'corda': it was trained on what is left of the base",
    replicated: "layer replication: the model has other layers",
}


@pytest.mark.parametrize("spoil", WRONG_FILES, ids=lambda edit: edit.__name__)
def test_wrong_file_is_a_clear_error_and_model_and_files_stay(spoil, saved):
    spoil(saved)
    base = model()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()}
    with pytest.raises(AdapterFileError) as caught:
        lora_fx.load(base, saved)
    assert WRONG_FILES[spoil] in str(caught.value)
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in saved.iterdir()} == files


def test_all_wrong_values_of_a_configuration_are_told_at_once(saved):
    reconfigure(saved, r="4", lora_dropout=1.5, modules_to_save="head", rank_pattern={"(a": 0}, alpha_pattern=[])
    with pytest.raises(AdapterFileError) as caught:
        lora_fx.load(model(), saved)
    assert caught.value.facts == (
        ("r", "must be an integer above 0, found '4'"),
        ("lora_dropout", "must be a number, at least 0 and below 1, found 1.5"),
        ("modules_to_save", "must be a list of strings, found 'head'"),
        ("rank_pattern (a", "must be an integer above 0, found 0"),
        ("rank_pattern (a", "`(` without `)`"),
        ("alpha_pattern", "must be a mapping, found []"),
    )


def test_directory_without_an_adapter_names_those_that_have_one(saved, tmp_path):
    outer = tmp_path / "runs"
    shutil.copytree(saved, outer / "last", ignore=lambda *_: ["runs"])
    with pytest.raises(AdapterFileError, match="these folders in it hold one: last"):
        lora_fx.load(model(), outer)


# -- what does not fit a model


def test_every_site_that_the_model_has_not_is_named(saved):
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(zoo.Encoder(layers=2), saved)
    assert caught.value.mismatches[:2] == (
        ("layer.2.attention.query", "16 → 16", "has no such linear"),
        ("layer.2.attention.value", "16 → 16", "has no such linear"),
    )


def test_other_shapes_are_named_with_both_sides(saved):
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(zoo.Encoder(width=32), saved)
    assert ("layer.0.attention.query", "16 → 16", "32 → 32") in caught.value.mismatches


def test_other_base_of_the_same_shape_is_refused(saved):
    torch.manual_seed(9)
    with pytest.raises(AdapterMismatchError, match="is another base, or was changed since"):
        lora_fx.load(zoo.Encoder(), saved)


def test_file_without_a_fingerprint_loads_onto_any_base_of_its_shape(saved):
    rewrite(saved, lambda tensors: None)
    torch.manual_seed(9)
    lora_fx.load(zoo.Encoder(), saved)


def test_adapted_model_takes_no_second_adapter(saved):
    with pytest.raises(RefusedError, match="adapted already"):
        lora_fx.load(adapted(), saved)


def test_the_name_of_a_repository_is_answered_with_what_fetches_it():
    with pytest.raises(AdapterFileError, match=r'snapshot_download\("someone/an-adapter"\)'):
        lora_fx.load(model(), "someone/an-adapter")
    with pytest.raises(AdapterFileError) as refused:
        lora_fx.load(model(), "some/where/else")
    assert "snapshot" not in str(refused.value)
