"""What each process holds of a model that FSDP2 shards over one, two and four: `python benchmarks/shares.py` prints the
table of docs/beyond-one-machine.md.  Nothing is timed.

The Llama of `tests/support/metered.py`, with rank 4 on all linear layers and AdamW, in processes of gloo, each with a
batch of its own of one size.  Bytes are those of local storages, as they are after each operator of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lora_fx.text import scaled

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.support.metered import at_most, by_all
from tests.support.performance import told
from tests.support.processes import in_processes

HELD = {
    "weights": "weights of the base",
    "adapters": "adapters",
    "optimizer": "optimiser states",
    "gradients": "gradients",
}
PASSES = "made and gathered by the passes"


def rows() -> list[tuple[str, ...]]:
    """Return, for each number of processes, what the fullest has."""
    table: list[tuple[str, ...]] = [
        ("processes", *HELD.values(), "over one process", PASSES, f"{PASSES}, checkpointed")
    ]
    whole = 0
    for number in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            ranks = in_processes(number, by_all, Path(folder))
        found = max((rank["all"] for rank in ranks), key=at_most)
        again = max((rank["all checkpointed"] for rank in ranks), key=at_most)
        lasting = sum(found[what] for what in HELD)
        whole = whole or lasting
        sizes = [found[what] for what in HELD]
        passes = [found["peak"], again["peak"]]
        cells = [
            *(scaled(size, "B") for size in sizes),
            f"{lasting / whole:.3f}",
            *(scaled(one, "B") for one in passes),
        ]
        table.append((str(number), *cells))
    return table


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into that page, between its marks")
    told(parser.parse_args(words).write, "shares", rows())


if __name__ == "__main__":
    main()
