"""Compare what a block gives with what it gives where padding of another sequence is something else."""

import functools
from collections.abc import Callable

from lora_fx.capture.guards import Match
from lora_fx.liveness.padding import Rows
from lora_fx.regions.checking import ModuleCall, Replay
from lora_fx.regions.crossing import Crossing, Waiting
from lora_fx.regions.packproof import depends_on


def prove_crossings(
    kept: Callable[[ModuleCall], Replay | None],
    call: ModuleCall,
    match: Match,
    waiting: list[Waiting],
) -> None:
    """Let padding of other sequences be zeros from now on, if nothing that a call gives depends on it by a bit.

    Args:
        kept: keeps a call, to make it again.
        call: of which all rows are there.
        match: gives the inputs of the program from a call.
        waiting: what is to be proven.
    """
    for crossing, rows in waiting:
        replay = kept(call)
        if replay is not None:
            crossing.why_not = replay.without_trace(functools.partial(_reaches, replay, match, crossing, rows)) or ""
            crossing.proven = not crossing.why_not


def _reaches(replay: Replay, match: Match, crossing: Crossing, rows: Rows, _: object) -> str | None:
    """Return that something depends on a row that is left out, if it does."""
    found = depends_on(replay, match, crossing.packing.hidden, rows, lambda result: result)
    return "what it gives depends on padding" if found else None
