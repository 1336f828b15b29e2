"""Files of PEFT's variants that are put together when they are read: what no such file can be is refused by name.

That they compute the same is in the rows of PEFT's own list.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file

import lora_fx
from lora_fx.files.adapter.names import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.filterwarnings("ignore")
KASA = {"kasa_config": peft.KasaConfig(), "r": 2}
BLOCKS = {"use_bdlora": BdLoraConfig(target_modules_bd_a=["0"], nblocks=2), "r": 4}
B_KEY = "base_model.model.0.lora_B.weight"


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6))


def without_diagonal(tensors: dict[str, Tensor], _config: dict[str, object]) -> None:
    del tensors["base_model.model.0.lora_diag"]


def other_blocks(_tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    config["use_bdlora"] = {"target_modules_bd_a": ["0"], "nblocks": 3}


def a_switch(_tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    config["use_bdlora"] = True


def both(_tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    config["init_lora_weights"] = "pissa"


def with_dora(_tensors: dict[str, Tensor], config: dict[str, object]) -> None:
    config["use_dora"] = True


@pytest.mark.parametrize(
    ("settings", "spoil", "told"),
    [
        (KASA, without_diagonal, "no diagonal of KaSA(.|\n)*0.lora_diag(.|\n)*missing"),
        (BLOCKS, other_blocks, r"no blocks of a diagonal(.|\n)*\[4, 4\], and 3 blocks"),
        (BLOCKS, a_switch, "use_bdlora(.|\n)*must be a table"),
        (KASA, both, "KaSA beside pissa"),
        (KASA, with_dora, "KaSA beside use_dora"),
    ],
)
def test_what_no_such_file_can_be_is_refused_by_name(settings, spoil, told, tmp_path):
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"], **settings)).save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS_FILE), json.loads((tmp_path / CONFIG_FILE).read_text())
    spoil(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    model = base()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lora_fx.AdapterFileError, match=told):
        lora_fx.load(model, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_kasa_leaves_the_base_alone_and_comes_back_bit_by_bit_as_a_plain_adapter(tmp_path):
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"], **KASA))
    with torch.no_grad():
        theirs.base_model.model[0].lora_B["default"].weight.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    model, x = base(), torch.randn(5, 8)
    tuned = lora_fx.load(model, tmp_path / "theirs")
    assert all(torch.equal(value, base().state_dict()[name]) for name, value in model.state_dict().items())
    lora_fx.save(tuned, tmp_path / "ours")
    again = lora_fx.load(model, tmp_path / "ours")
    assert torch.equal(again(x), tuned(x))
    torch.testing.assert_close(tuned(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["r"] == 4
    with pytest.raises(lora_fx.RefusedError, match=r"more than values for an adapter(.|\n)*makes anew"):
        lora_fx.swap(again, tmp_path / "theirs", adapter="default")


def test_no_rule_says_how_kasa_and_bd_lora_are_trained():
    for settings, told in ((KASA, "KaSA: it trains"), (BLOCKS, "BD-LoRA: it trains")):
        with pytest.raises(lora_fx.RefusedError, match=told):
            lora_fx.rules_from_peft(peft.LoraConfig(target_modules=["0"], **settings), base())


def test_values_lie_where_the_header_says_whatever_their_dtypes_and_wherever_they_begin(tmp_path):
    from lora_fx.files.safetensors import read_raw
    from lora_fx.files.values import read_tensors

    tensors = {
        "a": torch.arange(3, dtype=torch.uint8), "b": torch.randn(2, 3), "c": torch.randn(()), "e": torch.zeros(0, 2),
        "f": torch.randn(3).bfloat16(), "g": torch.randn(2).to(torch.float8_e4m3fn), "h": torch.tensor([True, False]),
        "i": torch.randn(4, dtype=torch.float64), "j": torch.randn(2, dtype=torch.complex64),
    }  # fmt: skip
    save_file(tensors, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length].rstrip() + b" ", content[8 + length :]
    for more in range(3):  # the library itself pads the header, so that values begin at a multiple of 8
        text = header + b" " * more
        (tmp_path / "odd").write_bytes(len(text).to_bytes(8, "little") + text + data)
        found = read_tensors(read_raw(tmp_path / "odd"))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
