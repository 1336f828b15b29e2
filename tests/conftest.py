"""Every test starts from the same random state, and has as many threads as TEST_THREADS says, or one.

A file starts without known graphs, and in most of them each test does.

What a test puts on the path of modules is taken off it again: processes that are spawned later would import it.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes is more that can hang

import pytest
import torch

for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():  # torch.manual_seed would format the whole stack for each, to tell of it later
        device.manual_seed_all = lambda seed: None

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


LONGEST = (
    "test_shared_zoo.py", "test_fuzz.py", "test_site_kinds.py", "test_export_executorch.py", "test_hazards.py",
    "test_compiled.py", "test_dora_kinds.py", "test_export_pt2.py", "test_kills.py", "test_export_onnx.py",
    "test_interruptions.py", "test_trl.py", "test_bench_tables.py", "test_shared_experts.py", "test_examples.py",
    "test_trainer.py", "test_adapted_state.py", "test_cached_prefix.py", "test_optimised_training.py", "test_packing.py",
    "test_labels.py", "test_routed_experts.py", "test_remerge_fuzz.py", "test_optimised.py", "test_adapted_compile.py",
    "test_invocations.py", "test_rows_of_experts.py", "test_adapters_of_experts.py", "test_backends_agree.py",
    "test_tensor_parallel.py", "test_known.py", "test_lora_fa.py", "test_heads.py", "test_draft.py", "test_docs.py",
)  # fmt: skip
"""Files that take 25 seconds or more in the default suite or in the slow one, the longest first."""

MANY_OBJECTS = 100_000
"""A look through so many takes some 30 ms."""

KEEPING_GRAPHS = {
    "adapters", "exporters", "files", "integrations", "liveness", "meshes", "planning", "training", "tuned",
    "test_labels.py", "test_packing.py", "test_apart.py", "test_optimised.py", "test_half_precision.py",
    "test_around_wrappers.py", "test_around_instances.py", "test_around_weights.py", "test_backends_agree.py",
    "test_diff.py", "test_drawn_lines.py",
}  # fmt: skip
"""Folders and files of tests not about capturing: the first of a file that meets a kind of block captures its graph.

Later ones take it and prove it anew, as a second model of a process does; elsewhere each test begins without any.
"""


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Leave crossed cases that are not in the sample to `make fuzz`, and let the longest files come first.

    Were a long file the last, it would be alone at the end, where files are spread over processes.
    """
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None and not _is_in_sample(item, sampled.args[0]):
            item.add_marker(pytest.mark.fuzz)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def _is_in_sample(case: pytest.Item, number: int) -> bool:
    """Whether a case is the one of so many that runs: squares of one colour of a board, so that each value is there."""
    place = 0
    for crossed in case.iter_markers("parametrize"):
        index = _index_in(crossed, case.callspec.params)  # type: ignore[attr-defined]
        place += index + index // number  # in one list of pairs too, the next kind has the other backend
    return place % number == 0


def _index_in(crossed: pytest.Mark, params: dict[str, object]) -> int:
    """Return which of the values that are crossed a case has; pytest itself counts whole cases."""
    names, values = crossed.args
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else names
    own = [params[name] for name in names]
    for index, value in enumerate(values):
        listed = value.values if isinstance(value, type(pytest.param())) else value if len(names) > 1 else (value,)
        if all(one is other for one, other in zip(listed, own, strict=True)):
            return index
    raise ValueError(f"values of {names} can be gone through once only")


def pytest_collection_finish():
    gc.freeze()  # a million objects of the libraries, which would be looked at in vain again and again
    gc.set_threshold(50_000, 20, 20)  # captures make many small objects that stay: this takes 8 % off their time


def pytest_terminal_summary(terminalreporter):
    """Show what long random runs have measured."""
    for report in (report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)):
        for name, value in report.user_properties:
            if name == "figures" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {value}")


@pytest.fixture(autouse=True, scope="module")
def _no_graphs_of_other_files():
    from lora_fx.regions.known import KNOWN

    KNOWN.clear()


def _freeze_what_stays():
    """Let collections look at what is new only, once a test has had all objects looked through and they are many.

    Libraries that tests import and models that they share stay as long as the process; steps that are counted begin
    with a collection, which would walk over all of them.
    """
    if gc.get_stats()[2]["collections"] == _seen["collections"]:
        return
    if len(gc.get_objects()) > MANY_OBJECTS:
        gc.collect()
        gc.freeze()
    _seen["collections"] = gc.get_stats()[2]["collections"]


_seen = {"collections": 0}
"""How many times all objects had been looked through when the last test began."""


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest):
    from lora_fx.discovery.looks import LOOKS
    from lora_fx.regions.known import KNOWN

    _freeze_what_stays()
    LOOKS.clear()
    place = request.path.relative_to(Path(__file__).parent)
    if KEEPING_GRAPHS.isdisjoint((place.parts[0], place.name)) or place.name == "test_routed_experts.py":
        KNOWN.clear()  # what other tests have captured
    torch.manual_seed(0)
    threads, path = torch.get_num_threads(), list(sys.path)
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch):
    """For tests of files: graphs change no value, and capturing them would take most of the time."""
    from lora_fx.discovery.study import Observed

    planned = Observed.planned
    monkeypatch.setattr(Observed, "planned", lambda seen, decisions, backend="": planned(seen, decisions, "modules"))


@pytest.fixture(scope="module")
def browser():
    """Chromium, without a window; whoever asks for it has made sure that it and the extra `browser` are there."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
