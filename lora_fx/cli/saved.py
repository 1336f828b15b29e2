"""JSON that lora_fx wrote before, from a file or the standard input.  No torch here."""

import sys
from pathlib import Path

from lora_fx.errors import LoraFxError
from lora_fx.planning.plan import Plan


class SavedFileError(LoraFxError):
    """A saved plan or graph cannot be read."""


def read_text(name: str) -> str:
    """Return the text of a file, or of the standard input for `-`.

    Raises:
        SavedFileError: it is missing or not text.
    """
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise SavedFileError(f"{name}: {reason or error}") from error


def read_plan(name: str) -> Plan:
    """Return a plan that `lora-fx plan --format json` wrote.

    Raises:
        SavedFileError: it is missing or not a plan.
    """
    try:
        return Plan.from_json(read_text(name))
    except ValueError as error:
        raise SavedFileError(f"{name}: {error}\n  write one with lora-fx plan … --format json -o FILE") from error
