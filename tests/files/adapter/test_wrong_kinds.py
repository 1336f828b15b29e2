"""Files of adapters of every kind that are wrong, or fit no model: a clear error with names and numbers, before anything
is made."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lora_fx
from lora_fx.errors import AdapterFileError, AdapterMismatchError, RefusedError
from lora_fx.files.adapter.codec import mixes_groups
from lora_fx.files.adapter.header import header_text
from lora_fx.files.adapter.names import METADATA_KEY, WEIGHTS_FILE
from tests.files.adapter.test_wrong_adapters import reconfigure, rewrite
from tests.support.kinds import (
    Convolutions,
    Experts,
    Matrices,
    Padded,
    Product,
    Tokens,
    built,
    computed,
    in_ours,
    in_peft,
)
from tests.support.zoo import rules


class Mix(nn.Module):
    """One weight of each kind."""

    def __init__(self, experts: int = 4, groups: int = 2, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1, groups=groups)
        self.words, self.qkv = nn.Embedding(50, 8), nn.Linear(8, 3 * width)
        self.wide, self.experts = Product(width, 8), Experts(experts)
        self.step = nn.Linear(8, 8)

    def forward(self, ids):
        hidden = self.words(ids)
        q, k, v = self.qkv(hidden).chunk(3, -1)
        hidden = self.wide((q * k).tanh() + v)
        for _ in range(3):
            hidden = self.step(hidden).tanh()
        hidden = self.conv(hidden.view(-1, 4, 8)).mean(-1)
        return self.experts(hidden)

    inputs = (torch.tensor([[1, 5, 7, 9], [49, 5, 5, 0]]),)


def rule(name: str, **settings) -> dict:
    return {"match": {"name": name}, "lora": {"r": 2}} | settings


RULES = {
    "version": 1,
    "rules": [
        rule("qkv", slices={"of": ["q", "k", "v"], "adapt": ["q", "v"]}),
        rule("experts.up", slices={"of": {"gate": 2, "up": 4}, "adapt": ["up"]}),
        rule("step", per_call=True),
        rule("**"),
    ],
}
STEMS = [
    "conv", "experts", "experts.base_layer", "qkv", "step.call_0", "step.call_1", "step.call_2", "wide", "words",
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file of a model with an adapter of each kind, written once."""
    folder = tmp_path_factory.mktemp("mix")
    in_ours(built(Mix), folder, RULES, Mix.inputs)
    return folder


@pytest.fixture
def saved(written, tmp_path):
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def content_of(folder) -> tuple[dict[str, torch.Tensor], dict]:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()[METADATA_KEY])


def reseal(folder, change) -> None:
    """Let `change` alter tensors and header; the hash then fits again, as if somebody had written it so."""
    tensors, header = content_of(folder)
    del header["sha256"], header["format"]
    change(tensors, header)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt", METADATA_KEY: header_text(header, tensors)})


def fails(folder, kind: type[Exception], model: nn.Module | None = None, inputs: object = None) -> Exception:
    """Return the error of loading; model and files must be as they were."""
    model = built(Mix) if model is None else model
    state = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(kind) as caught:
        lora_fx.load(model, folder, inputs)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    return caught.value


def key(stem: str, factor: str = "A") -> str:
    return f"base_model.model.{stem}." + (f"lora_embedding_{factor}" if stem == "words" else f"lora_{factor}.weight")


def test_file_that_nobody_spoils_loads_with_and_without_inputs(saved):
    blind = lora_fx.load(built(Mix), saved)
    seeing = lora_fx.load(built(Mix), saved, lora_fx.call(*Mix.inputs))
    assert sorted(content_of(saved)[1]["sites"]) == STEMS
    assert torch.equal(computed(blind, Mix.inputs), computed(seeing, Mix.inputs))


# -- tensors


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_missing_factor_is_named(stem, factor, saved):
    reseal(saved, lambda tensors, _: tensors.pop(key(stem, factor)))
    error = fails(saved, AdapterFileError)
    # with no A of that kind the keys of an embedding are those of a linear
    assert any("is missing" in problem and stem in name for name, problem in error.facts)


@pytest.mark.parametrize("stem", STEMS)
def test_both_factors_missing_are_named(stem, saved):
    reseal(saved, lambda tensors, _: [tensors.pop(key(stem, factor)) for factor in "AB"])
    assert fails(saved, AdapterFileError).facts == ((stem, "is in the header but not in the file"),)


@pytest.mark.parametrize("name", ["conv.lora_C.weight", "experts.lora_embedding_A.weight", "words.lora_embedding_C"])
def test_extra_tensor_is_named(name, saved):
    reseal(saved, lambda tensors, _: tensors.update({f"base_model.model.{name}": torch.zeros(2)}))
    assert (f"base_model.model.{name}", "is of no kind that lora_fx knows") in fails(saved, AdapterFileError).facts


def swapped(tensors, stem: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    tensors[key(stem, "A")], tensors[key(stem, "B")] = torch.zeros(a), torch.zeros(b)


WRONG_SHAPES = {
    "kernel": ("conv", (4, 4, 5), (8, 2, 1), "A [4, 4, 5], B [8, 2, 1]", "A [4, 4, 3], B [8, 2, 1]"),
    "rank": ("conv", (2, 4, 3), (8, 2, 1), "has rank 2, adapter_config.json says 4", ""),
    "vocabulary": ("words", (2, 60), (8, 2), "60 → 8", "50 → 8"),
    "width": ("qkv", (4, 6), (24, 4), "6 → 24", "8 → 24"),
    "raw parameter": ("wide", (2, 6), (8, 2), "6 → 8", "8 → 8"),
    "another rank": ("wide", (3, 8), (8, 3), "A [3, 8], B [8, 3]", "A [2, 8], B [8, 2]"),
    "bank": ("experts.base_layer", (10, 8), (6, 10), "A [10, 8], B [6, 10]", "A [8, 8], B [6, 8]"),
    "inputs of a bank": ("experts", (8, 5), (8, 8), "5 → 8", "6 → 8"),
}


@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_wrong_shape_is_named_with_both_sides(case, saved):
    stem, a, b, given, expected = WRONG_SHAPES[case]
    reseal(saved, lambda tensors, _: swapped(tensors, stem, a, b))
    if case == "rank":
        assert fails(saved, AdapterFileError).facts == ((stem, given),)
        return
    path = {"experts": "experts.down", "experts.base_layer": "experts.up", "wide": "wide.w"}.get(stem, stem)
    assert fails(saved, AdapterMismatchError).mismatches == ((path, given, expected),)


def test_factors_that_do_not_multiply_are_named(saved):
    reseal(saved, lambda tensors, _: swapped(tensors, "experts", (8, 6), (8, 6)))
    problem = "lora_A [8, 6] and lora_B [8, 6] do not multiply"
    assert fails(saved, AdapterFileError).facts == (("experts", problem),)


def test_grouped_convolution_whose_factor_mixes_the_groups_is_refused(saved):
    reseal(saved, lambda tensors, _: tensors[key("conv")].fill_(0.5))
    problem = mixes_groups(2)
    assert fails(saved, AdapterMismatchError).mismatches == (("conv", "in the file", problem),)


@pytest.mark.parametrize(("stem", "path", "row", "column"), [("qkv", "qkv", 9, 0), ("qkv", "qkv", 0, 3),
                         ("experts.base_layer", "experts.up", 1, 5)])  # fmt: skip
def test_value_outside_of_the_slices_is_refused(stem, path, row, column, saved):
    def spoil(tensors, _):
        tensors[key(stem, "B")][row, column] = 0.5

    reseal(saved, spoil)
    problem = "its lora_B has values outside of the slices"
    assert fails(saved, AdapterMismatchError).mismatches == ((path, "in the file", problem),)


@pytest.mark.parametrize("stem", STEMS)
def test_value_that_is_no_number_is_named(stem, saved):
    reseal(saved, lambda tensors, _: tensors[key(stem)].view(-1)[:1].fill_(float("nan")))
    assert fails(saved, AdapterFileError).facts == ((key(stem), "has NaN or infinite values"),)


# -- other models


def test_bank_of_another_size_is_named_with_its_numbers(saved):
    error = fails(saved, AdapterMismatchError, built(Mix, experts=5))
    assert ("experts.up", "A [8, 8], B [6, 8]", "A [10, 8], B [6, 10]") in error.mismatches
    assert ("experts.down", "A [8, 6], B [8, 8]", "A [10, 6], B [8, 10]") in error.mismatches


def test_convolution_with_other_groups_is_named_with_its_numbers(saved):
    error = fails(saved, AdapterMismatchError, built(Mix, groups=4))
    assert ("conv", "A [4, 4, 3], B [8, 2, 1]", "A [4, 4, 3], B [8, 1, 1]") in error.mismatches


def test_parts_of_another_size_are_named_with_their_numbers(saved):
    error = fails(saved, AdapterMismatchError, built(Mix, width=4))
    assert ("qkv", "8 → 24", "8 → 12") in error.mismatches
    assert ("wide.w", "8 → 8", "8 → 4") in error.mismatches


def test_model_that_calls_a_module_less_often_is_told_of_the_calls(saved):
    class Once(Mix):
        def forward(self, ids):
            hidden = self.wide(self.qkv(self.words(ids))[..., :8])
            return self.experts(self.conv(self.step(hidden).view(-1, 4, 8)).mean(-1))

    error = fails(saved, AdapterMismatchError, built(Once), lora_fx.call(*Mix.inputs))
    assert set(error.mismatches) == {("step", "an adapter for each of 3 calls", "called 1 times")}


def test_another_base_is_named_for_every_kind(saved):
    torch.manual_seed(9)
    error = fails(saved, AdapterMismatchError, Mix().eval())
    assert {name for name, _, _ in error.mismatches} == {
        "conv.weight", "experts.down", "experts.up", "qkv.weight", "step.weight", "wide.w", "words.weight",
    }  # fmt: skip


# -- the header


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_is_read_as_something_else(seed, saved):
    content = (saved / WEIGHTS_FILE).read_bytes()
    wanted = computed(lora_fx.load(built(Mix), saved), Mix.inputs)
    draw, model = random.Random(seed), built(Mix)
    size = 8 + int.from_bytes(content[:8], "little")
    for where in [*draw.sample(range(size), 60), *draw.sample(range(size, len(content)), 10)]:
        flipped = bytearray(content)
        flipped[where] ^= 1 << draw.randrange(8)
        (saved / WEIGHTS_FILE).write_bytes(flipped)
        try:
            again = lora_fx.load(model, saved)
        except (AdapterFileError, AdapterMismatchError):
            continue
        assert torch.equal(computed(again, Mix.inputs), wanted), f"bit flipped in byte {where}"


ODD_NOTES = {
    "op": "sideways",
    "init": "by hand",
    "layout": "diagonal",
    "read": "yes",
    "parameter": 7,
    "path": None,
    "slices": {"of": ["q"], "adapt": ["x"]},
    "call": -1,
    "calls": "many",
    "file_ranks": 0,
    "r": 0,
    "alpha": "high",
    "dropout": 2,
    "dora": "no",
    "rule": 5,
}


@pytest.mark.parametrize("name", ODD_NOTES)
@pytest.mark.parametrize("stem", ["qkv", "wide", "step.call_1", "experts"])
def test_header_with_an_odd_value_is_an_error_of_ours(name, stem, saved):
    reseal(saved, lambda _, header: header["sites"][stem].update({name: ODD_NOTES[name]}))
    fails(saved, (AdapterFileError, AdapterMismatchError, RefusedError))


def test_slices_that_do_not_fit_the_weight_are_an_error_of_ours(saved):
    slices = {"of": {"gate": 2, "up": 5}, "adapt": ["up"]}
    reseal(saved, lambda _, header: header["sites"]["experts.base_layer"].update(slices=slices))
    (mismatch,) = fails(saved, AdapterMismatchError).mismatches
    assert mismatch[:2] == ("experts.up", "its slices")
    assert "7" in mismatch[2]


def test_more_parts_than_the_file_has_ranks_for_are_an_error_of_ours(saved):
    slices = {"of": ["q", "k", "v"], "adapt": ["q", "k", "v"]}
    reseal(saved, lambda _, header: header["sites"]["qkv"].update(slices=slices))
    mismatch = ("qkv", "has 2 · r ranks", "3 parts, 1 groups")
    assert fails(saved, AdapterMismatchError).mismatches == (mismatch,)


def test_two_notes_of_one_site_are_refused(saved):
    reseal(saved, lambda _, header: header["sites"]["step.call_1"].update(header["sites"]["step.call_0"]))
    assert "step" in str(fails(saved, (AdapterFileError, AdapterMismatchError)))


# -- files without lora_fx's header


def test_factors_of_one_of_two_parameters_missing_are_named(tmp_path):
    base = built(Matrices)
    in_peft(base, tmp_path, r=2, target_modules=[], target_parameters=["pair.a", "pair.z"])
    rewrite(tmp_path, lambda tensors: [tensors.pop(key("pair", factor)) for factor in "AB"])
    error = fails(tmp_path, AdapterMismatchError, base)
    assert error.mismatches == (("pair.a", "has no factors in the file", "is one of target_parameters"),)


def test_factors_of_more_parameters_than_the_model_has_are_named(tmp_path):
    in_peft(built(Matrices), tmp_path, r=2, target_modules=[], target_parameters=["pair.a", "pair.z"])
    other = built(Matrices)
    del other.pair.a
    error = fails(tmp_path, AdapterMismatchError, other)
    assert ("pair.base_layer", "8 → 6", "has no such linear") in error.mismatches


@pytest.mark.parametrize(("name", "rows"), [("first.w", 3), ("experts.up", 12)])
def test_rank_of_a_parameter_that_contradicts_the_configuration_is_named(name, rows, tmp_path):
    base = built(Matrices)
    in_peft(base, tmp_path, r=3, target_modules=[], target_parameters=[name])
    reconfigure(tmp_path, r=2)
    error = fails(tmp_path, AdapterMismatchError, base)
    wanted = f"{rows // 3 * 2} by adapter_config.json, r 2"
    assert error.mismatches == ((name, f"lora_A has {rows} rows", wanted),)


@pytest.mark.parametrize(("kind", "chosen"), [(Matrices, rules("**")), (Tokens, rules("**")),
                         (Convolutions, rules("**")), (Padded, rules("conv"))])  # fmt: skip
def test_our_own_file_without_its_header_computes_the_same(kind, chosen, tmp_path):
    base = built(kind) if kind is not Padded else built(kind, groups=2)
    wanted = computed(in_ours(base, tmp_path, chosen, kind.inputs), kind.inputs)
    rewrite(tmp_path, lambda tensors: None)
    for sample in (None, lora_fx.call(*kind.inputs)):
        torch.testing.assert_close(computed(lora_fx.load(base, tmp_path, sample), kind.inputs), wanted)


def test_calls_without_the_header_are_no_sites_of_the_model(tmp_path):
    base, chosen = built(Mix), {"version": 1, "rules": [rule("step", per_call=True), rule("qkv")]}
    in_ours(base, tmp_path, chosen, Mix.inputs)
    rewrite(tmp_path, lambda tensors: None)
    error = fails(tmp_path, AdapterMismatchError, base)
    assert error.mismatches == tuple((f"step.call_{call}", "8 → 8", "has no such linear") for call in range(3))
