"""The 46 models and settings with which PEFT 0.21 tests its own LoRA: each is the same here, or refused by name.

PEFT adapts a model, and its file must give the same outputs and merged weights here; what is written of that must give
them again in PEFT.
"""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from lora_fx.files.adapter.configuration import read_configuration
from tests.support.kinds import EFFECT, computed, distance, from_file_in_peft, in_peft
from tests.support.peftrows import MODELS, ROWS, Row

pytestmark = pytest.mark.filterwarnings("ignore")


def eps(tensor: Tensor) -> float:
    """Return how far two such results may lie apart, relative to them: each is two sums of fewer than 250 terms."""
    return 500 * torch.finfo(tensor.dtype).eps


def case(row: Row) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = MODELS[row.model]().eval()
    if row.settings.get("init_lora_weights") == "mica" or "kasa_config" in row.settings:  # these compute in float32
        return model, model.inputs
    return model.double(), tuple(x.double() if x.is_floating_point() else x for x in model.inputs)


def test_rows_are_46():
    assert len({row.name for row in ROWS}) == 46


@pytest.mark.parametrize("row", [row for row in ROWS if not row.refused], ids=lambda row: row.name)
def test_row_is_the_same_here_and_back_in_peft(row, tmp_path):
    base, inputs = case(row)
    theirs = in_peft(base, tmp_path / "theirs", **row.settings)
    wanted = computed(theirs, inputs)
    assert distance(computed(base, inputs), wanted) > EFFECT / 2
    ours = lora_fx.load(base, tmp_path / "theirs", lora_fx.call(*inputs))
    assert distance(computed(ours, inputs), wanted) < eps(wanted)
    merged, expected = lora_fx.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=eps(value))
    lora_fx.save(ours, tmp_path / "ours")
    again = lora_fx.load(base, tmp_path / "ours")
    assert torch.equal(computed(again, inputs), computed(ours, inputs))
    if (
        row.saved_for != "PEFT"
    ):  # PEFT adds the product of out_proj twice, which was trained so; of once it knows nothing
        with pytest.raises(ValueError, match=r"only lora_fx can read this adapter, since at mha\.out_proj"):
            from_file_in_peft(base, tmp_path / "ours")
    else:
        assert distance(computed(from_file_in_peft(base, tmp_path / "ours"), inputs), wanted) < eps(wanted)


@pytest.mark.parametrize("row", [row for row in ROWS if row.refused], ids=lambda row: row.name)
def test_row_is_refused_by_name_before_anything_is_changed(row, tmp_path):
    base, inputs = case(row)
    in_peft(base, tmp_path, **row.settings)
    before, classes = copy.deepcopy(base.state_dict()), [type(module) for module in base.modules()]
    with pytest.raises((AdapterFileError, AdapterMismatchError, RefusedError), match=row.refused):
        lora_fx.load(base, tmp_path, lora_fx.call(*inputs))
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert [type(module) for module in base.modules()] == classes


# -- which layers a configuration means

PATHS = (
    "", "fc", "key.1.fc", "net.key.1.fc", "net.key.10.fc", "net.key.001.fc", "net.other.1.fc", "net.key.1.in.2.fc",
    "net.key.2.in.1.fc", "model.h.1.attn.q", "model.h.1.attn.q.fc.out", "net.q", "blocks.1.weight", "mlp.blocks.1.weight",
    "mlp.blocks.1.bias", "netfc",
)  # fmt: skip
NAMES = ([], ["fc"], ["key"], ["fc", "q"], ["q", "weight"], ["net.key.1.fc"])
EXPRESSIONS = ("fc", ".*c", "f.*", ".*key.*", ".*et.*", r"net\.key\.\d+\.(fc|q)")
LAYERS = ([0], [1], [2], [0, 1, 2], 1)
BEFORE = (None, [], "", ["key"], "key", ["h"], ["net"], ["fc"], ["blocks"], ["h", "key"], ["k[a-z]+"])
CLAIMS: dict[str, list[dict[str, Any]]] = {
    "names": [{"target_modules": names} for names in NAMES],
    "expressions": [{"target_modules": expression} for expression in EXPRESSIONS],
    "layers": [
        {"target_modules": names, "layers_to_transform": layers, "layers_pattern": before}
        for names, layers, before in itertools.product(NAMES, LAYERS, BEFORE)
    ],
    "exclusions": [
        {"target_modules": targets, **without}
        for targets in (["fc", "q"], ".*")
        for without in (
            {"exclude_modules": ["fc"]}, {"exclude_modules": ["key.1.fc"]}, {"exclude_modules": r".*\.1\..*"},
            {"modules_to_save": ["key"]}, {"modules_to_save": ["fc"]},
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("settings", CLAIMS.values(), ids=CLAIMS)
def test_configuration_claims_the_layers_that_peft_would_adapt(settings, tmp_path):
    chosen = set()
    for setting in settings:
        theirs = LoraConfig(**setting)
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in theirs.to_dict().items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps(written))
        ours = read_configuration(tmp_path / "adapter_config.json")
        expected = [path for path in PATHS if check_target_module_exists(theirs, path)]
        assert [path for path in PATHS if ours.claims(path)] == expected, setting
        chosen |= set(expected)
    assert len(chosen) > 4
