"""The 46 models and settings with which PEFT 0.21 tests its own LoRA: each is the same here, or refused by name.

PEFT adapts a model, and its file must give the same outputs and merged weights here; what is written of that must give
them again in PEFT.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import KasaConfig, LoraConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.config import BdLoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from lora_fx.files.adapter.configuration import read_configuration
from tests.support.kinds import EFFECT, computed, distance, from_file_in_peft, in_peft

pytestmark = pytest.mark.filterwarnings("ignore")


def eps(tensor: Tensor) -> float:
    """Return how far two such results may lie apart, relative to them: each is two sums of fewer than 250 terms."""
    return 500 * torch.finfo(tensor.dtype).eps


class Times(nn.Module):
    """A linear that stores its weight as [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


def chain(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def convolution(name: str, conv: nn.Module, outputs: int, *sizes: int) -> nn.Module:
    """Return a convolution over an input of [batch, channels, sizes…], and a linear behind it."""
    shape = nn.Unflatten(1, (conv.in_channels, *sizes))
    return chain(view=shape, **{name: conv}, relu=nn.ReLU(), flat=nn.Flatten(), lin0=nn.Linear(outputs, 2))


def mlp(kind: Callable[[int, int], nn.Module]) -> nn.Module:
    return chain(lin0=kind(10, 20), relu=nn.ReLU(), drop=nn.Dropout(0.5), lin1=kind(20, 2))


def tokens() -> nn.Module:
    layers = {"emb": nn.Embedding(100, 5), "conv1d": Conv1D(1, 5), "tanh": nn.Tanh(), "flat": nn.Flatten()}
    return chain(**layers, lin0=nn.Linear(10, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP": (lambda: mlp(nn.Linear), 10),
    "MLP of parameters": (lambda: mlp(Times), 10),
    "embedding": (tokens, 10),
    "Conv1d": (lambda: convolution("conv1d", nn.Conv1d(1, 1, 2), 9, 10), 10),
    "Conv2d": (lambda: convolution("conv2d", nn.Conv2d(5, 10, 3), 10, 3, 3), 45),
    "Conv3d": (lambda: convolution("conv3d", nn.Conv3d(5, 10, 3), 10, 3, 3, 3), 135),
    "8 groups": (lambda: convolution("conv2d", nn.Conv2d(16, 16, 3, groups=8), 16, 3, 3), 144),
    "2 groups": (lambda: convolution("conv2d", nn.Conv2d(16, 32, 3, padding=1, groups=2), 128, 2, 2), 64),
    "attention": (Attention, 10),
}
"""The model of each kind, and how many numbers (or ids) one input has."""


def case(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    make, width = MODELS[kind]
    x = torch.randint(0, 100, (9, width)) if kind == "embedding" else torch.randn(9, width, dtype=dtype)
    return make().to(dtype).eval(), (x,)


def on(*names: str, **settings: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **settings}


def velora(start: str) -> VeloraConfig:
    return VeloraConfig(num_groups=2, init_type=start)


DORA, BIAS = {"use_dora": True}, {"lora_bias": True, "lora_alpha": 32}
Row = tuple[str, dict[str, Any]]
READ: dict[str, Row] = {
    "an expression": ("MLP", {"target_modules": "lin0"}),
    "the first": ("MLP", on("lin0")),
    "the second": ("MLP", on("lin1")),
    "both": ("MLP", on("lin0", "lin1")),
    "the second trained whole": ("MLP", on("lin0", modules_to_save=["lin1"])),
    "alpha and dropout": ("MLP", on("lin0", lora_alpha=4, lora_dropout=0.1)),
    "DoRA of the first": ("MLP", on("lin0", **DORA)),
    "DoRA of both": ("MLP", on("lin0", "lin1", **DORA)),
    "DoRA with an alpha": ("MLP", {"target_modules": "lin1", **DORA, "lora_alpha": 32}),
    "MiCA": ("MLP", on("lin0", init_lora_weights="mica", r=4)),
    "VeLoRA, random": ("MLP", on("lin0", velora_config=velora("random"))),
    "VeLoRA, averages": ("MLP", on("lin0", "lin1", velora_config=velora("batch_average"))),
    "VeLoRA, the first average": ("MLP", on("lin0", velora_config=velora("batch_average_once"))),
    "MonteCLoRA": ("MLP", on("lin0", monteclora_config=MontecloraConfig(num_samples=2))),
    "bias of B": ("MLP", on("lin0", "lin1", **BIAS)),
    "bias of B in Conv2d": ("Conv2d", on("conv2d", **BIAS)),
    "bias of B in Conv3d": ("Conv3d", on("conv3d", **BIAS)),
    "Conv1D": ("embedding", on("conv1d")),
    "embedding": ("embedding", on("emb")),
    "embedding and Conv1D": ("embedding", on("emb", "conv1d")),
    "DoRA of Conv1D": ("embedding", on("conv1d", **DORA)),
    "rows of the embedding": ("embedding", on("conv1d", trainable_token_indices={"emb": [0, 10]})),
    "Conv1d": ("Conv1d", on("conv1d")),
    "Conv2d": ("Conv2d", on("conv2d")),
    "Conv2d and linear": ("Conv2d", on("conv2d", "lin0")),
    "Conv3d": ("Conv3d", on("conv3d")),
    "Conv3d and linear": ("Conv3d", on("conv3d", "lin0")),
    "attention": ("attention", on("mha")),
    "attention and linear": ("attention", on("mha", "lin0")),
    "parameter": ("MLP of parameters", {"target_parameters": ["lin0.weight"]}),
    "module and parameter": ("MLP", on("lin0", target_parameters=["lin1.weight"])),
}

MIXES = (
    AdapterMismatchError,
    r"conv2d +file in the file +model its lora_A reads the channels of all \d groups of the ",
)
BLOCKS = (AdapterFileError, "use_bdlora +BD-LoRA: a factor holds only the blocks of its diagonal")
A, B = {"target_modules_bd_a": ["lin0"]}, {"target_modules_bd_b": ["lin1"], "nblocks": 2}


def linears_alone(name: str) -> tuple[type[Exception], str]:
    return RefusedError, f"{name} +DoRA is for whole linear layers, not for this kind of site"


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[type[Exception], str]]] = {
    "KaSA": ("MLP", on("lin0", kasa_config=KasaConfig(), r=4), (AdapterFileError, "KaSA: it changes the base weights")),
    "DoRA of an embedding": ("embedding", on("emb", **DORA), linears_alone("emb")),
    "DoRA of embedding and Conv1D": ("embedding", on("emb", "conv1d", **DORA), linears_alone("emb")),
    "DoRA of Conv1d": ("Conv1d", on("conv1d", **DORA), linears_alone("conv1d")),
    "DoRA of Conv2d": ("Conv2d", on("conv2d", **DORA), linears_alone("conv2d")),
    "DoRA of Conv2d and linear": ("Conv2d", on("conv2d", "lin0", **DORA), linears_alone("conv2d")),
    "DoRA of Conv3d": ("Conv3d", on("conv3d", **DORA), linears_alone("conv3d")),
    "DoRA of Conv3d and linear": ("Conv3d", on("conv3d", "lin0", **DORA), linears_alone("conv3d")),
    "8 groups": ("8 groups", on("conv2d"), MIXES),
    "2 groups": ("2 groups", on("conv2d"), MIXES),
    "DoRA of 8 groups": ("8 groups", on("conv2d", **DORA), MIXES),
    "DoRA of 2 groups": ("2 groups", on("conv2d", **DORA), MIXES),
    "BD-LoRA, A": ("MLP", on("lin0", "lin1", use_bdlora=BdLoraConfig(**A, match_strict=False)), BLOCKS),
    "BD-LoRA, B": ("MLP", on("lin0", "lin1", use_bdlora=BdLoraConfig(**B, match_strict=False)), BLOCKS),
    "BD-LoRA, both": ("MLP", on("lin0", "lin1", use_bdlora=BdLoraConfig(**A, **B)), BLOCKS),
}


def test_rows_are_46():
    assert len(READ) + len(REFUSED) == 46


@pytest.mark.parametrize(("kind", "settings"), READ.values(), ids=READ)
def test_row_is_the_same_here_and_back_in_peft(kind, settings, tmp_path):
    base, inputs = case(kind, torch.float32 if "init_lora_weights" in settings else torch.float64)  # MiCA wants that
    theirs = in_peft(base, tmp_path / "theirs", **settings)
    wanted = computed(theirs, inputs)
    assert distance(computed(base, inputs), wanted) > EFFECT
    ours = lora_fx.load(base, tmp_path / "theirs", lora_fx.call(*inputs))
    assert distance(computed(ours, inputs), wanted) < eps(wanted)
    merged, expected = lora_fx.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=eps(value))
    lora_fx.save(ours, tmp_path / "ours")
    again = lora_fx.load(base, tmp_path / "ours")
    assert torch.equal(computed(again, inputs), computed(ours, inputs))
    if kind == "attention":  # PEFT adds the product of out_proj twice, which was trained so; of once it knows nothing
        with pytest.raises(ValueError, match=r"only lora_fx can read this adapter, since at mha\.out_proj"):
            from_file_in_peft(base, tmp_path / "ours")
    else:
        assert distance(computed(from_file_in_peft(base, tmp_path / "ours"), inputs), wanted) < eps(wanted)


@pytest.mark.parametrize(("kind", "settings", "refusal"), REFUSED.values(), ids=REFUSED)
def test_row_is_refused_by_name_before_anything_is_changed(kind, settings, refusal, tmp_path):
    base, inputs = case(kind)
    in_peft(base, tmp_path, **settings)
    before, classes = copy.deepcopy(base.state_dict()), [type(module) for module in base.modules()]
    error, words = refusal
    with pytest.raises(error, match=words):
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
