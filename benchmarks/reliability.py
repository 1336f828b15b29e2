"""Long runs, threads, faults, kills and full disks: `python benchmarks/reliability.py` prints what comes of each.

Everything is counted; nothing is timed but where a kill falls.  `--write docs/reliability.md` puts the tables there,
`--quick` does a little of each, `--only long threads` some sections.  Kills, disks and a long run's memory need Linux.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.support import disasters, faultcases
from tests.support.disasters import Found, Writer
from tests.support.endurance import SETTLED, SUBJECTS, Held, long_run, threads_at_once
from tests.support.performance import told

Rows = list[tuple[str, ...]]
_LONG = """
import json, sys, tempfile, warnings
from dataclasses import asdict
from pathlib import Path
import torch
from tests.support.endurance import SUBJECTS, long_run
warnings.simplefilter("ignore")
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    found = long_run(int(sys.argv[2]), Path(folder), int(sys.argv[3]), SUBJECTS[sys.argv[1]])
    print(json.dumps([asdict(held) for held in found]))
"""


def faults(quick: bool) -> Iterator[tuple[str, Rows]]:
    """Yield what exceptions at lines and edits leave behind."""
    rows: Rows = [("function", "faults", "ended it", "left something changed")]
    with tempfile.TemporaryDirectory() as folder:
        for name, case in faultcases.cases(Path(folder)).items():
            if quick and not name.startswith(("drop", "GraphModule")):
                continue
            found = faultcases.at_lines(*case, 2 if quick else 100)
            rows.append((name, str(found.tried), str(found.tried - found.went_on), _count(found.changed)))
    yield "faults", rows
    rows = [("change of a graph", "edits, a fault after each", "left something changed")]
    for name, case in faultcases.EDITING.items():
        found = faultcases.at_edits(*case)
        rows.append((name, str(found.tried), _count(found.changed)))
    yield "edits", rows


def kills(quick: bool) -> Iterator[tuple[str, Rows]]:
    """Yield what writers leave behind that are killed at random moments."""
    rows: Rows = [("writer", "kills", "old", "new", "nothing", "unfinished", "torn, or not put right")]
    for name, writer in _writers(quick):
        found = disasters.killed_at_random(writer, 2 if quick else 20)
        times = [found.times[key] for key in ("old", "new", "none", "unfinished")]
        rows.append((name, "2" if quick else "20", *map(str, times), _count(found.wrong)))
    yield "kills", rows


def disks(quick: bool) -> Iterator[tuple[str, Rows]]:
    """Yield what writers do on full and read-only disks, in folders that vanish, and two at a time."""
    rows: Rows = [("writer", "what happens", "times", "refused", "old", "new", "nothing", "unfinished", "wrong")]
    happens: dict[str, Callable[[Writer], Found]] = {
        "the disk is full": lambda writer: disasters.on_full_disk(writer, 2 if quick else 20),
        "the folder is read-only": disasters.read_only,
        "the folder vanishes": lambda writer: disasters.vanishing(writer, 12 if quick else 1),
        "two processes write at once": lambda writer: disasters.two_at_once(writer, 1 if quick else 20),
    }
    for name, writer in _writers(quick):
        for what, happen in happens.items():
            found = happen(writer)
            times = [found.times[key] for key in ("refused", "old", "new", "none", "unfinished")]
            rows.append((name, what, str(sum(times[1:]) + found.times["torn"]), *map(str, times), _count(found.wrong)))
    yield "disks", rows


def _writers(quick: bool) -> Iterator[tuple[str, Writer]]:
    with tempfile.TemporaryDirectory() as folder:
        yield from disasters.writers(Path(folder), ("merged",) if quick else disasters.TARGETS).items()


def long(quick: bool) -> Iterator[tuple[str, Rows]]:
    """Yield what a process holds after many steps, in a process of its own, with lora_fx and without."""
    steps, settled = (30, 10) if quick else (5000, SETTLED)
    rows: Rows = [("adapted by", "steps", *(name for name, _ in _shown(Held(0, 0, 0, 0, 0, 0))))]
    for name, start in SUBJECTS.items():
        if quick:
            with tempfile.TemporaryDirectory() as folder:
                found = long_run(steps, Path(folder), settled, start)
        else:
            command = [sys.executable, "-c", _LONG, name, str(steps), str(settled)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
            first, last = json.loads(done.stdout.splitlines()[-1])
            found = Held(**first), Held(**last)
        for step, one in zip((settled, steps), found, strict=True):
            rows.append((name, f"{step:,}", *(text for _, text in _shown(one))))
    yield "long", rows


def _shown(held: Held) -> list[tuple[str, str]]:
    return [
        ("graphs", str(held.graphs)),
        ("open files", str(held.files)),
        ("objects of Python", f"{held.objects:,}"),
        ("freed tuples", f"{held.tuples:,}"),
        ("in use (MB)", f"{held.used / 1e6:.1f}"),
        ("memory (MB)", f"{held.resident / 1e6:.1f}"),
    ]


def threads(quick: bool) -> Iterator[tuple[str, Rows]]:
    """Yield what threads compute while one changes the model."""
    rows: Rows = [("while one thread does", "times", "calls of the others", "a mixture, or an error")]
    with tempfile.TemporaryDirectory() as folder:
        for name, served in threads_at_once(2 if quick else 8, 2 if quick else 50, Path(folder)).items():
            rows.append((name, str(served.changes), f"{served.calls:,}", _count(served.mixed)))
    yield "threads", rows


def _count(what: Sequence[str]) -> str:
    """Return how many; name the first on the standard error."""
    for one in what[:5]:
        print(f"  {one}", file=sys.stderr)
    return str(len(what))


SECTIONS = {"long": long, "threads": threads, "faults": faults, "kills": kills, "disks": disks}


def main(words: Sequence[str] | None = None) -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    asked.add_argument("--quick", action="store_true", help="a little of each, to try the command")
    asked.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into that page, between their marks")
    options = asked.parse_args(words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for section in options.only:
            print(section, file=sys.stderr, flush=True)
            for name, rows in SECTIONS[section](options.quick):
                told(options.write, name, rows)
                print()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    main()
