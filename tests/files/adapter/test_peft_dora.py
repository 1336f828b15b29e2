"""DoRA of convolutions and embeddings in PEFT's layers and here: outputs, gradients, merges and files agree both ways."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft

import lora_fx
from lora_fx.errors import AdapterFileError, RefusedError
from tests.support.kinds import Convolutions, Matrices, Padded, Tokens, built, from_file_in_peft, in_ours, jitter_
from tests.support.peftkinds import each
from tests.support.zoo import randomise_

pytestmark = [pytest.mark.usefixtures("no_graphs"), pytest.mark.filterwarnings("ignore")]
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Scaled(nn.Embedding):
    """An embedding whose forward scales, as Gemma's does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class ScaledTokens(Tokens):
    def __init__(self) -> None:
        super().__init__()
        self.words = Scaled(50, 12, padding_idx=0)


CASES = {
    "Conv1d": (Convolutions, {"target_modules": ["line"]}),
    "Conv2d": (Convolutions, {"target_modules": ["plane"]}),
    "Conv3d": (Convolutions, {"target_modules": ["space"], "use_rslora": True}),
    "all of them": (Convolutions, {"target_modules": ["line", "plane", "space", "out"], "rank_pattern": {"plane": 2}}),
    "embedding": (Tokens, {"target_modules": ["words"]}),
    "embedding and linear": (Tokens, {"target_modules": ["words", "out"], "alpha_pattern": {"words": 5}}),
}
every = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def in_peft(case: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    """Return the base, PEFT's model with values in its adapter, and inputs."""
    kind, settings = CASES[case]
    base = built(kind).to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, use_dora=True, **settings))
    jitter_(theirs)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in kind.inputs)
    return base, theirs.eval(), inputs


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def gradients(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return the gradients of A, B and m, by the path of the layer and the kind, each flat."""
    model.zero_grad()
    model(*inputs).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path, kind = name.removeprefix("base_model.model.").split(".lora_")
            kind = kind.removeprefix("embedding_").split(".")[0]
            found[path, kind] = parameter.grad.flatten()
    return found


@every
@dtypes
def test_outputs_gradients_and_merges_are_those_of_peft(case: str, dtype: torch.dtype):
    base, theirs, inputs = in_peft(case, dtype)
    ours = lora_fx.from_peft(theirs, inputs).eval()
    assert relative(ours(*inputs), theirs(*inputs)) <= CLOSE[dtype]
    assert relative(base(*inputs), theirs(*inputs)) > 1e-2
    wanted, found = gradients(theirs, inputs), gradients(ours, inputs)
    assert found.keys() == wanted.keys()
    assert {kind for _, kind in found} == {"A", "B", "magnitude_vector"}
    for key, gradient in wanted.items():
        assert relative(found[key], gradient) <= 10 * CLOSE[dtype], key
    merged, expected = lora_fx.merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@every
@dtypes
def test_files_go_both_ways(case: str, dtype: torch.dtype, tmp_path):
    base, theirs, inputs = in_peft(case, dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = theirs(*inputs)
    ours = lora_fx.load(base, tmp_path / "theirs", inputs).eval()
    assert relative(ours(*inputs), wanted) <= CLOSE[dtype]
    lora_fx.save(ours, tmp_path / "ours")
    assert relative(from_file_in_peft(base, tmp_path / "ours")(*inputs), wanted) <= CLOSE[dtype]
    assert relative(lora_fx.to_peft(ours)(*inputs), wanted) <= CLOSE[dtype]
    assert torch.equal(lora_fx.load(base, tmp_path / "ours", inputs).eval()(*inputs), ours(*inputs))


@every
def test_bases_in_bfloat16_agree_within_its_rounding(case: str, tmp_path):
    base, theirs, inputs = in_peft(case, torch.bfloat16)
    ours = lora_fx.from_peft(theirs, inputs).eval()
    assert {parameter.dtype for parameter in lora_fx.parameters(ours)} == {torch.float32}
    wanted = theirs(*inputs).float()
    assert relative(ours(*inputs).float(), wanted) <= 2**-5
    lora_fx.save(ours, tmp_path)
    assert relative(from_file_in_peft(base, tmp_path)(*inputs).float(), ours(*inputs).float()) <= 2**-5


@pytest.mark.parametrize("groups", [2, 4])
@dtypes
def test_grouped_convolution_that_we_wrote_computes_the_same_in_peft(groups: int, dtype: torch.dtype, tmp_path):
    """PEFT reads m, and multiplies B [out, r] as [out / g, g · r] by A: with our blocks that is B A, filter by filter."""
    base, inputs = built(Padded, groups=groups, padding=1).to(dtype), (Padded.inputs[0].to(dtype),)
    ours = in_ours(base, tmp_path, {"rules": [each("conv", 3, dora=True)]}, inputs)
    theirs = from_file_in_peft(base, tmp_path)
    assert relative(theirs(*inputs), ours(*inputs)) <= CLOSE[dtype]
    assert relative(lora_fx.merge(ours)(*inputs), ours(*inputs)) <= CLOSE[dtype]
    back = lora_fx.load(base, tmp_path, inputs)
    assert torch.equal(back(*inputs), ours(*inputs))
    from_theirs = lora_fx.from_peft(theirs, inputs)
    assert relative(from_theirs(*inputs), ours(*inputs)) <= CLOSE[dtype]


def test_embedding_that_scales_what_it_looks_up_shows_its_weight(tmp_path):
    base = built(ScaledTokens)
    ours = in_ours(base, tmp_path, {"rules": [each("words", 3, dora=True)]}, ScaledTokens.inputs)
    merged = lora_fx.merge(ours)
    assert relative(merged(*ScaledTokens.inputs), ours(*ScaledTokens.inputs)) <= 1e-6
    with pytest.raises(ValueError, match=r"only lora_fx can read this adapter, since at words code reads its weight"):
        from_file_in_peft(base, tmp_path)


# -- what PEFT cannot have


def test_raw_parameter_is_saved_for_lora_fx_alone(tmp_path):
    base, inputs = built(Matrices), Matrices.inputs
    ours = in_ours(base, tmp_path, {"rules": [each("first.w", 3, dora=True)]}, inputs)
    assert torch.equal(lora_fx.load(base, tmp_path, inputs)(*inputs), ours(*inputs))
    with pytest.raises(ValueError, match=r"only lora_fx can read .* first\.w it is DoRA of a raw parameter"):
        from_file_in_peft(base, tmp_path)
    with pytest.raises(RefusedError, match=r"first\.w +it is DoRA of a raw parameter, which PEFT does not have"):
        lora_fx.to_peft(ours)
    settings = peft.LoraConfig(target_modules=[], target_parameters=["first.w"], use_dora=True)
    with pytest.raises(ValueError, match="does not work with use_dora=True"):
        peft.get_peft_model(copy.deepcopy(base), settings)


@pytest.mark.parametrize("name", ["conv", "words"])
def test_row_of_zeros_stays_zero_here_and_makes_the_file_fail_in_peft(name: str, tmp_path):
    base = built(Padded if name == "conv" else Tokens)
    inputs = (Padded if name == "conv" else Tokens).inputs
    weight = base.get_parameter(f"{name}.weight")
    with torch.no_grad():
        (weight[1] if name == "conv" else weight[:, 1]).zero_()
    ours = lora_fx.apply(base, {"rules": [each(name, 2, dora=True)]}, inputs)
    assert torch.equal(ours.eval()(*inputs), base(*inputs))
    lora_fx.save(ours, tmp_path)
    with pytest.raises(ValueError, match="a row of its weight is zero, and PEFT would divide it by its length"):
        from_file_in_peft(base, tmp_path)
    randomise_(ours)
    assert lora_fx.merge(ours)(*inputs).isfinite().all()


def test_lengths_of_another_shape_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    base, theirs, _ = in_peft("Conv2d", torch.float32)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "magnitude" in key)
    save_file({**tensors, key: tensors[key][:, :5]}, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"has shape \[1, 5, 1, 1\], not \[8\]"):
        lora_fx.load(base, tmp_path)
