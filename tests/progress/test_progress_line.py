"""The line on a terminal: it comes late, gives way to what else is written, and is gone at the end."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.progress import terminal as line
from lora_fx.progress.steps import counting, running, step
from lora_fx.text import cells
from tests.support.terminals import seen, terminal


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(line, "PATIENCE", 0.0)
    monkeypatch.setattr(line, "_OFTEN", 0.0)


def lines_drawn(written: str) -> list[str]:
    return [text.strip() for text in written.split("\r") if text.strip()]


def test_line_says_what_is_done_and_is_erased(monkeypatch):
    with terminal(monkeypatch) as told, running("apply", None, 2), step("adapting", 2, "sites") as doing:
        doing.advance("a.q")
    drawn = lines_drawn(told.written)
    assert "apply: adapting, 0 of 2 sites · 0 % · 0 s" in drawn
    assert "apply: adapting a.q, 1 of 2 sites · 25 % · 0 s" in drawn
    assert seen(told.written) == [""]


def test_a_whole_call_shows_a_line_and_leaves_none(monkeypatch):
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with terminal(monkeypatch) as told:
        lora_fx.apply(layers, r=2, target="*", example_inputs=(torch.ones(2, 4),))
        assert sys.stderr is told.stream
    assert any(text.startswith("apply: adapting") for text in lines_drawn(told.written))
    assert seen(told.written) == [""]


def test_a_short_call_shows_nothing_and_a_long_one_waits(monkeypatch):
    monkeypatch.setattr(line, "PATIENCE", 3600.0)
    with terminal(monkeypatch) as told, running("apply", None), step("adapting", 2):
        pass
    assert told.written == ""
    with terminal(monkeypatch) as told, running("apply", True), step("adapting", 2):
        pass
    assert lines_drawn(told.written)


def test_false_shows_nothing(monkeypatch):
    with terminal(monkeypatch) as told, running("apply", False), step("adapting", 2) as doing:
        doing.advance()
    assert told.written == ""


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_logs_of_ci_and_dumb_terminals_show_nothing_unasked(monkeypatch, name, value):
    with terminal(monkeypatch) as told:
        monkeypatch.setenv(name, value)
        with running("apply", None), step("adapting", 2):
            pass
    assert told.written == ""


def test_a_clock_draws_while_nothing_is_told_and_stops_at_the_end(monkeypatch):
    monkeypatch.setattr(line, "_TICK", 0.01)
    drawn = threading.Event()
    draw = line.Line._draw

    def noted(self):
        draw(self)
        drawn.set()

    monkeypatch.setattr(line.Line, "_draw", noted)
    threads = threading.active_count()
    with terminal(monkeypatch) as told, running("apply", None):
        assert threading.active_count() == threads + 1
        assert drawn.wait(30)
    assert threading.active_count() == threads
    assert lines_drawn(told.written)[0] == "apply · 0 s"
    assert seen(told.written) == [""]


def test_without_a_clock_no_thread_runs_beside_the_work(monkeypatch):
    threads = threading.active_count()
    with terminal(monkeypatch) as told, running("bench", None, clock=False), step("timing"):
        assert threading.active_count() == threads
    assert lines_drawn(told.written)


def test_warnings_and_prints_stand_on_lines_of_their_own(monkeypatch):
    with terminal(monkeypatch) as told, running("apply", True), step("adapting", 3, "sites") as doing:
        doing.advance()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda *facts: sys.stderr.write(
                warnings.formatwarning(*facts[:4])
            )  # pytest has its own
            warnings.warn("something is odd", lora_fx.LoraFxWarning, stacklevel=1)
        doing.advance()
        print("a print", file=sys.stderr)
        sys.stderr.writelines(["two\n", "lines\n"])
        doing.advance()
    lines = seen(told.written)
    assert lines[0].endswith("LoraFxWarning: something is odd")
    assert lines[-4:] == ["a print", "two", "lines", ""]
    assert not any("adapting" in text for text in lines if "warn(" not in text)


def test_line_waits_until_what_others_write_has_ended(monkeypatch):
    with terminal(monkeypatch) as told, running("apply", True), step("adapting", 3, "sites") as doing:
        sys.stderr.write("half of")
        doing.advance()
        sys.stderr.write(" a line\n")
    assert seen(told.written) == ["half of a line", ""]


def test_an_error_leaves_no_line_and_the_streams_as_they_were(monkeypatch):
    with terminal(monkeypatch) as told:
        with pytest.raises(KeyError), running("apply", True), step("adapting", 2):
            raise KeyError
        assert sys.stderr is told.stream
    assert lines_drawn(told.written)
    assert seen(told.written) == [""]


def test_one_line_at_a_time_is_on_the_terminal(monkeypatch):
    with terminal(monkeypatch) as told:
        with running("first", True), step("one", 2, "things") as doing:
            thread = threading.Thread(target=_another)
            thread.start()
            thread.join()
            doing.advance()
        _another()
    drawn = lines_drawn(told.written)
    assert [text.split(":")[0] for text in drawn] == sorted(
        (text.split(":")[0] for text in drawn), key="first other".find
    )
    assert {text.split(":")[0] for text in drawn} == {"first", "other"}
    assert seen(told.written) == [""]


def _another() -> None:
    with running("other", True), step("two", 2, "things") as doing:
        doing.advance()


def test_a_terminal_that_has_gone_stops_nothing(monkeypatch):
    class Gone:
        def isatty(self):
            return True

        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(sys, "stderr", Gone())
    with running("apply", None), step("adapting", 2) as doing:
        doing.advance()


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_line_stays_on_one_line_of_the_terminal(monkeypatch, columns):
    with terminal(monkeypatch, columns) as told, running("apply", True), step("adapting", 12, "sites") as doing:
        doing.advance("model.layers.0.self_attn." + "層" * 40)
    drawn = lines_drawn(told.written)
    assert all(cells(text) < columns for text in drawn)
    assert all(text.endswith(" · 0 s") for text in drawn)


def test_names_do_not_move_the_cursor(monkeypatch):
    with terminal(monkeypatch) as told, running("apply", True), step("adapting", 2, "sites") as doing:
        doing.advance("a\x1b[2J\r\nb")
    assert "\x1b" not in told.written
    assert "adapting a\\x1b[2J\\r\\nb" in told.written


def test_bytes_of_a_merge_are_told_as_they_are(monkeypatch):
    with terminal(monkeypatch) as told, counting("merge", True) as written:
        written(1_000, 4_000, "model.norm.weight")
    assert "merge: model.norm.weight · 25 % · 0 s" in lines_drawn(told.written)
    with counting("merge", None) as written:
        assert written(1, 2, "") is None


def test_a_notebook_is_watched_too(monkeypatch):
    class OutStream:
        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    OutStream.__module__ = "ipykernel.iostream"
    stream = OutStream()
    monkeypatch.setattr(sys, "stderr", stream)
    with running("apply", None), step("adapting", 2, "sites"):
        pass
    assert sys.stderr is stream
    assert "apply: adapting, 0 of 2 sites" in stream.text
    assert seen(stream.text) == [""]
