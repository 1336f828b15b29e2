"""What adapters have become: right numbers, pictures that show them, a page that needs nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.graphdiff.deltas.heatmaps import places_of
from lora_fx.graphdiff.deltas.measure import singular_values
from tests.support import zoo
from tests.support.htmlpages import Page
from tests.support.zoo import rules


def trained(**lora: object):
    model = zoo.Gpt(layers=3).eval()
    tuned = lora_fx.apply(model, rules("**.{c_attn,c_fc}", **lora), (zoo.tokens(2, 6),))
    for parameter in lora_fx.parameters(tuned):
        parameter.data.normal_(0, 0.1)
    return model, tuned


def test_deltas_are_those_of_the_whole_matrix():
    model, tuned = trained(r=4, alpha=12)
    merged = lora_fx.merge(tuned)
    for site in lora_fx.deltas(tuned).sites:
        weight = model.get_submodule(site.path).weight.double()
        delta = merged.get_submodule(site.path).weight.double() - weight
        assert site.norm == pytest.approx(delta.norm().item(), rel=1e-4)
        assert site.weight_norm == pytest.approx(weight.norm().item(), rel=1e-5)
        assert site.singular_values == pytest.approx(torch.linalg.svdvals(delta)[:4].tolist(), rel=1e-4)
        assert site.ratio == pytest.approx(site.norm / site.weight_norm)


def test_singular_values_never_need_the_large_matrix():
    B, A = torch.randn(200_000, 4), torch.randn(4, 200_000)  # B A would take 160 GB
    values = singular_values(B, A)
    gram = torch.linalg.eigvals((B.double().T @ B.double()) @ (A.double() @ A.double().T)).real
    assert torch.allclose(values.square(), gram.sort(descending=True).values, rtol=1e-8)


def test_effective_rank_counts_the_directions_that_are_used():
    _, tuned = trained(r=4)
    for name, parameter in tuned.named_parameters():
        if "c_attn.lora_A" in name:
            parameter.data[1:] = 0
    used = {site.path.split(".")[-1]: site.effective_rank for site in lora_fx.deltas(tuned).sites}
    assert used["c_attn"] == pytest.approx(1, abs=1e-6)
    assert 1 < used["c_fc"] <= 4


def test_untrained_adapters_change_nothing_and_say_so():
    model = zoo.Mlp()
    deltas = lora_fx.deltas(lora_fx.apply(model, rules("fc1")))
    (site,) = deltas.sites
    assert (site.norm, site.ratio, site.effective_rank) == (0, 0, 0)
    for form in (str(deltas), deltas.to_svg(), deltas.to_html(), deltas.to_json()):
        assert "fc1" in form


def test_models_without_adapters_or_values_are_refused():
    with pytest.raises(RefusedError, match="not adapted"):
        lora_fx.deltas(zoo.Mlp())
    with torch.device("meta"):
        model = zoo.Mlp()
    with pytest.raises(RefusedError, match="no values"):
        lora_fx.deltas(lora_fx.apply(model, rules("fc1")))


def test_heatmaps_are_xml_with_the_numbers_in_the_cells():
    _, tuned = trained(r=4)
    root = ElementTree.fromstring(lora_fx.deltas(tuned).to_svg())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("4") == 6
    assert {"h.0", "h.1", "h.2", "c_attn", "c_fc", "rank r"} <= set(texts)


def test_page_of_adapters_is_well_formed_and_asks_nobody_for_anything():
    _, tuned = trained(r=4)
    text = lora_fx.deltas(tuned).to_html()
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert text.count('class="bars"') == 6


def test_the_number_of_the_layer_is_the_one_that_varies_most():
    places = places_of([f"1.layers.{k}.mlp.{j}" for k in range(5) for j in range(2)] + ["head"])
    assert places[3] == ("1.layers.1", "mlp.1")
    assert places[-1] == ("", "head")
