"""Records as text, picture and page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import lora_fx
from tests.support import runs
from tests.support.htmlpages import Page

SVG = "{http://www.w3.org/2000/svg}"


def read(path, number: int = 40, layers: int = 4):
    return lora_fx.read_record(runs.made_up(path / "run.jsonl", number, layers))


def test_summary_tells_losses_layers_and_what_is_not_trained(tmp_path):
    lines = str(read(tmp_path)).splitlines()
    assert lines[0] == "Llama · 8 sites in 4 layers · step 400 · 40 lines"
    assert lines[2].startswith("  loss  first 1.96, last 0.11, lowest 0.11 (step 400), smoothed 0.18")
    assert "  moved most layers.3, least layers.0" in lines
    assert lines[-1] == "  not trained, ΔW is 0: layers.0.q_proj"
    assert sum("layers." in line for line in lines) == 6


def test_summary_of_many_layers_shows_those_that_moved_most_and_least(tmp_path):
    text = str(read(tmp_path, layers=40))
    assert re.findall(r"^  layers\.(\d+) ", text, re.MULTILINE) == [
        *map(str, [0, 1, 2, 3, 4, 5, 34, 35, 36, 37, 38, 39])
    ]
    assert "… 28 layers more, whose ‖ΔW‖ is between these" in text


def test_record_without_steps_is_shown(tmp_path):
    record = lora_fx.read_record(runs.written(tmp_path / "run.jsonl", []))
    assert str(record) == "Llama · 8 sites in 4 layers · no step yet"
    for form in (record.to_svg(), record.to_html(), record.to_json()):
        assert "Llama" in form


def test_record_without_losses_has_its_norms(tmp_path):
    record = lora_fx.read_record(runs.written(tmp_path / "run.jsonl", [runs.line(7, None, [0.5] * 8)]))
    assert "loss" not in str(record)
    assert "‖ΔW‖ by layer" in record.to_svg()


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_picture_is_xml_with_a_point_for_each_loss_and_the_norms_in_the_cells(tmp_path):
    record = read(tmp_path)
    root = ElementTree.fromstring(record.to_svg())
    assert len(list(root.iter(f"{SVG}circle"))) == 40
    shown = texts(record.to_svg())
    assert {"loss", "‖ΔW‖ by layer", "layers.0", "layers.3", "10", "400"} <= set(shown)
    assert shown.count(f"{record.layer_norms(record.steps[-1])[3]:.3g}") == 1


def test_picture_of_a_long_run_is_small_and_always_the_same(tmp_path):
    record = read(tmp_path, number=20_000)
    drawn = record.to_svg()
    assert len(drawn) < 200_000
    assert drawn == lora_fx.read_record(tmp_path / "run.jsonl").to_svg()
    assert len(record.to_html()) < 400_000


def test_losses_that_are_no_numbers_are_marked(tmp_path):
    lines = [runs.line(step, 1.0 if step < 5 else "NaN", [0.5] * 8, 1) for step in range(1, 9)]
    record = lora_fx.read_record(runs.written(tmp_path / "run.jsonl", lines))
    assert record.to_svg().count('class="void"') == 4
    assert "NaN from step 5" in texts(record.to_svg())
    assert "! loss is NaN from step 5" in str(record)
    assert "<b>loss is NaN from step 5</b>" in record.to_html()
    assert str(record).count("×") == 4


def test_page_is_well_formed_has_every_site_and_asks_nobody_for_anything(tmp_path):
    text = read(tmp_path).to_html()
    page = Page(text)
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & set(attributes)]
    assert text.count('<th scope="row">') == 8
    assert text.count("0: not trained") == 1


def test_page_of_very_many_sites_stays_small_and_says_what_it_leaves_out(tmp_path):
    text = read(tmp_path, number=3, layers=3000).to_html()
    assert len(text.encode()) < 5_000_000
    assert re.search(r"\d more left out to keep the page small", text)


def test_names_cannot_break_out_of_a_page_or_a_picture(tmp_path):
    path = runs.made_up(tmp_path / "run.jsonl")
    path.write_bytes(path.read_bytes().replace(b"layers.1.q_proj", b"<script>&\\u001b[2J").replace(b"Llama", b"<b>"))
    record = lora_fx.read_record(path)
    assert "<script>&" not in record.to_html()
    assert ElementTree.fromstring(record.to_svg()) is not None
    assert "\x1b" not in record.to_html() + record.to_svg() + record._repr_html_()


def test_a_record_among_other_values_is_one_short_line(tmp_path):
    assert len(repr(read(tmp_path))) < 300


def test_a_notebook_shows_the_summary(tmp_path):
    record = read(tmp_path)
    assert "moved most layers.3" in record._repr_html_()
