"""DoRA on parts of a weight: their outputs have lengths, all others stay as they are to the bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import lora_fx
from lora_fx.errors import AdapterMismatchError
from tests.adapters.test_slices import SLICED, Sliced, both
from tests.support.dorakinds import lengthened, magnitude_of
from tests.support.sitekinds import factors, factors_of, flat, randomise_, relative, run, same_values

WHOLE = [sliced for sliced in SLICED if not sliced.name.startswith("bank")]
every_kind = pytest.mark.parametrize("sliced", WHOLE, ids=lambda sliced: sliced.name)


def rules(sliced: Sliced, dropout: float = 0.0) -> dict:
    chosen = sliced.rules(dropout)
    chosen["rules"][0]["lora"]["dora"] = True
    return chosen


def started(
    sliced: Sliced, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    return lora_fx.apply(sliced.build(dtype), rules(sliced, dropout), sliced.sample(dtype), backend=backend)


def trained(
    sliced: Sliced, backend: str = "modules", dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    tuned = started(sliced, backend, dtype, dropout)
    randomise_(tuned)
    return tuned


def rows_of(sliced: Sliced) -> list[int]:
    return [row for part in sliced.rows for row in part]


def dense(sliced: Sliced, tuned: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = dict(sliced.build(dtype).named_parameters())[sliced.weight].detach()
    V = weight + sliced.delta(*factors_of(tuned, sliced.weight), weight.shape)
    return lengthened(V, magnitude_of(tuned, sliced.weight), sliced.layout, rows_of(sliced))


def reference(sliced: Sliced, tuned: nn.Module, dtype: torch.dtype) -> Tensor:
    model = sliced.build(dtype).requires_grad_(False)
    return flat(functional_call(model, {sliced.weight: dense(sliced, tuned, dtype)}, sliced.sample(dtype).args))


@every_kind
@both
def test_model_starts_bit_equal_to_its_base(sliced: Sliced, backend: str):
    tuned, base = started(sliced, backend, dropout=0.2), sliced.build().requires_grad_(False)
    weight, is_layer = base.get_parameter(sliced.weight), sliced.weight.endswith(".weight")
    for training in (False, True):
        for grad in (False, True):
            weight.requires_grad_(grad and not is_layer)  # as a weight that is read: torch takes another kernel for it
            sample = sliced.sample()
            assert torch.equal(run(tuned, sample, training, grad), run(base, sample, training, grad))


@every_kind
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@both
@pytest.mark.sampled(2)
def test_output_and_gradients_are_those_of_the_weight(sliced: Sliced, backend: str, dtype: torch.dtype, allowed: float):
    tuned = trained(sliced, backend, dtype)
    result, expected = run(tuned, sliced.sample(dtype), grad=True), reference(sliced, tuned, dtype)
    assert relative(result, expected) <= allowed
    assert relative(expected, run(sliced.build(dtype), sliced.sample(dtype))) > 1e-2
    loss = torch.arange(result.numel(), dtype=dtype).cos()
    ours, theirs = (
        torch.autograd.grad((output * loss).sum(), list(factors(tuned).values())) for output in (result, expected)
    )
    for gradient, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 0
        assert relative(gradient, wanted) <= 10 * allowed


@every_kind
def test_merged_rows_are_these_and_all_others_stay_to_the_bit(sliced: Sliced):
    tuned = trained(sliced)
    before, after = (dict(model.named_parameters())[sliced.weight] for model in (sliced.build(), lora_fx.merge(tuned)))
    adapted = torch.zeros(before.shape[-1 if sliced.layout == "in_out" else 0], dtype=torch.bool)
    adapted[rows_of(sliced)] = True
    assert torch.equal((after != before).any(-1 if sliced.layout == "out_in" else -2), adapted)
    assert relative(after, dense(sliced, tuned)) <= 1e-6


@every_kind
def test_lengths_are_those_of_the_adapted_rows(sliced: Sliced):
    tuned = started(sliced)
    assert magnitude_of(tuned, sliced.weight).shape == (len(rows_of(sliced)),)
    plan = lora_fx.plan(sliced.build(), rules(sliced), sliced.sample())
    assert plan.trainable == sum(factor.numel() for factor in factors(tuned).values())


@every_kind
def test_files_hold_the_lengths_of_all_rows(sliced: Sliced, tmp_path):
    tuned, sample = trained(sliced, dropout=0.2), sliced.sample()
    lora_fx.save(tuned, tmp_path)
    stored = dict(sliced.build().named_parameters())[sliced.weight].detach()
    norms = (stored.t() if sliced.layout == "in_out" else stored).norm(dim=1)
    written = next(v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if "magnitude" in k)
    expected = norms.index_put((torch.tensor(rows_of(sliced)),), magnitude_of(tuned, sliced.weight).detach())
    torch.testing.assert_close(written, expected)
    loaded = lora_fx.load(sliced.build(), tmp_path, sample)
    assert same_values(loaded, tuned)
    for training in (False, True):
        assert torch.equal(run(loaded, sample, training), run(tuned, sample, training))
    other = started(sliced)
    lora_fx.swap(other, tmp_path, adapter="default")
    assert torch.equal(run(other, sample), run(tuned, sample))


@pytest.mark.parametrize("sliced", [sliced for sliced in WHOLE if sliced.weight == "0.weight"], ids=lambda s: s.name)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_computes_the_same_with_the_file(sliced: Sliced, tmp_path):
    peft = pytest.importorskip("peft")
    tuned, sample = trained(sliced), sliced.sample()
    lora_fx.save(tuned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(sliced.build(), tmp_path).eval()
    assert relative(run(theirs, sample), run(tuned, sample)) <= 1e-6
    assert relative(run(lora_fx.to_peft(tuned), sample), run(tuned, sample)) <= 1e-6


@pytest.mark.parametrize(
    "sliced", [s for s in WHOLE if s.name in ("equal parts", "raw parameter")], ids=lambda sliced: sliced.name
)
def test_merging_in_files_leaves_the_other_rows_to_the_bit(sliced: Sliced, tmp_path):
    tuned, base = trained(sliced), sliced.build()
    lora_fx.save(tuned, tmp_path / "adapter")
    (tmp_path / "base").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in base.state_dict().items()},
              tmp_path / "base" / "model.safetensors")  # fmt: skip
    (tmp_path / "base" / "config.json").write_text(json.dumps({}))
    lora_fx.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    after = load_file(tmp_path / "merged" / "model.safetensors")[sliced.weight]
    before, expected = base.state_dict()[sliced.weight], lora_fx.merge(tuned).state_dict()[sliced.weight]
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(after == before, expected == before)


def test_lengths_of_other_parts_do_not_fit(tmp_path):
    first = next(sliced for sliced in SLICED if sliced.name == "equal parts")
    second = next(sliced for sliced in SLICED if sliced.name == "one part")
    lora_fx.save(trained(second), tmp_path)
    with pytest.raises(AdapterMismatchError, match="other slices"):
        lora_fx.swap(started(first), tmp_path, adapter="default")
