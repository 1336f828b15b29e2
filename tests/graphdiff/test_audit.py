"""What stands out in an adapter: shares that add up, sites that differ from their kind, and no word of judgement."""

import json
import math

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.graphdiff.deltas.audit import audit_of
from lora_fx.graphdiff.deltas.spectra import DeltaRow
from tests.support import zoo
from tests.support.clitools import run
from tests.support.kinds import Experts
from tests.support.zoo import rules


def row(path: str, *singular_values: float) -> DeltaRow:
    norm = math.hypot(*singular_values)
    return DeltaRow(path, "rule", len(singular_values), 1.0, (8, 8), norm, None, tuple(singular_values))


def trained(layers: int = 6):
    tuned = lora_fx.apply(zoo.Gpt(layers=layers).eval(), rules("**.{c_attn,c_fc}", r=2), backend="modules")
    torch.manual_seed(0)
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter, std=0.1)
    return tuned


def test_energy_is_the_share_of_the_squared_norm_and_the_largest_come_first():
    audit = audit_of("a", [row("x", 1.0), row("y", 2.0, 2.0), row("z", 1.0, 0.0)])
    assert {site.path: site.energy for site in audit.sites} == pytest.approx({"y": 0.8, "x": 0.1, "z": 0.1})
    assert audit.sites[0].path == "y"
    assert [site.first for site in audit.sites] == pytest.approx([0.5, 1.0, 1.0])
    assert (audit.sites_with(0.5), audit.sites_with(0.9), audit.sites_with(1.0)) == (1, 2, 3)


def test_site_far_from_the_others_of_its_kind_stands_out_and_another_kind_does_not_matter():
    usual = [row(f"layers.{k}.q", 1.0 + 0.02 * k) for k in range(8)]
    audit = audit_of("a", [*usual, row("layers.8.q", 9.0), row("head", 100.0)])
    assert [site.path for site in audit.sites if site.stands_out] == ["layers.8.q"]
    far = next(site for site in audit.sites if site.stands_out)
    assert far.times_usual == pytest.approx(9.0 / 1.08)
    assert "layers.8.q" in str(audit)
    assert "stands out, z = " in str(audit)


def test_fewer_than_four_of_a_kind_say_nothing_of_what_is_usual():
    audit = audit_of("a", [row("layers.0.q", 1.0), row("layers.1.q", 1.0), row("layers.2.q", 50.0)])
    assert {(site.times_usual, site.z) for site in audit.sites} == {(None, None)}


@pytest.mark.parametrize("norms", [[0.0] * 6, [0.0] * 5 + [1.0], [1.0] * 5 + [0.0], [1.0] * 6], ids=str)
def test_untrained_and_equal_sites_give_finite_numbers(norms):
    audit = audit_of("a", [row(f"layers.{k}.q", norm) for k, norm in enumerate(norms)])
    document = json.loads(audit.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert sum(site["stands_out"] for site in document["sites"]) == (0 < norms.count(0.0) < 6)
    assert "nan" not in str(audit)


def test_directory_gives_the_facts_of_the_model_that_was_saved(tmp_path):
    tuned = trained()
    lora_fx.save(tuned, tmp_path / "a")
    of_model, of_files = lora_fx.audit(tuned), lora_fx.audit(tmp_path / "a")
    assert [site.path for site in of_files.sites] == [site.path for site in of_model.sites]
    for one, other in zip(of_model.sites, of_files.sites, strict=True):
        assert other.norm == pytest.approx(one.norm, rel=1e-6)
        assert other.energy == pytest.approx(one.energy, rel=1e-6)


def test_bank_of_experts_counts_each_expert_in_a_directory_as_in_the_model(tmp_path):
    tuned = lora_fx.apply(
        Experts(), {"version": 1, "rules": [{"match": {"op": "matmul"}, "lora": {"r": 2}}]}, (torch.randn(2, 8),)
    )
    for parameter in lora_fx.parameters(tuned):
        nn.init.normal_(parameter)
    lora_fx.save(tuned, tmp_path / "a")
    norms = ({site.path: site.norm for site in lora_fx.audit(given).sites} for given in (tuned, tmp_path / "a"))
    mine, theirs = norms
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_directory_that_is_none_and_model_that_is_not_adapted_are_refused(tmp_path):
    with pytest.raises(lora_fx.AdapterFileError):
        lora_fx.audit(tmp_path)
    with pytest.raises(lora_fx.RefusedError):
        lora_fx.audit(zoo.Mlp())


def test_command_shows_the_most_energetic_sites_all_that_stand_out_and_no_verdict(tmp_path):
    tuned = trained(layers=16)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "h.3.c_attn.lora_B" in name:
                parameter.mul_(1e-3)
    lora_fx.save(tuned, tmp_path / "a")
    shown = run("audit", str(tmp_path / "a"))
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert "32 sites" in lines[0]
    assert "1 standing out" in lines[0]
    assert sum("stands out" in line for line in lines) == 1
    assert "  … 11 sites more with less energy" in lines
    assert lines[-1].startswith("Facts, not a verdict")
    assert json.loads(run("audit", str(tmp_path / "a"), "--format", "json").output)["sites"][0]["energy"] > 0


def test_grouped_convolution_of_a_file_is_audited_as_that_of_the_model(tmp_path):
    torch.manual_seed(0)
    tuned = lora_fx.apply(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), rules("0", r=2))
    nn.init.normal_(tuned[0].lora_B["default"].weight)
    lora_fx.save(tuned, tmp_path)
    (own,), (filed,) = lora_fx.audit(tuned).sites, lora_fx.audit(tmp_path).sites
    weight = lora_fx.merge(tuned)[0].weight - tuned[0].get_parameter("weight")
    assert filed.norm == pytest.approx(own.norm) == pytest.approx(float(weight.detach().norm()), rel=1e-5)
    assert filed.effective_rank == pytest.approx(own.effective_rank)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolution_of_peft_which_mixes_groups_is_audited(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 1, groups=2)), config)
    theirs.save_pretrained(tmp_path)
    layer = theirs.base_model.model[0]
    x = torch.eye(4).reshape(4, 4, 1, 1)  # of each channel what the adapter makes of it
    delta = layer.lora_B["default"](layer.lora_A["default"](x)).flatten(1)
    assert lora_fx.audit(tmp_path).sites[0].norm == pytest.approx(float(delta.detach().norm()), rel=1e-5)
