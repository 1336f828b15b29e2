"""JSON that lora_fx wrote before, from a file or the standard input.  No torch here."""

import sys

from lora_fx.errors import LONGEST_NAME, LoraFxError
from lora_fx.planning.plan import Plan
from lora_fx.planning.reading import PlanFileError
from lora_fx.sources.document import MOST_JSON_BYTES
from lora_fx.sources.regular import UnreadableError, read_bytes, read_stream
from lora_fx.text import shortened


class SavedFileError(LoraFxError):
    """A saved plan or graph cannot be read."""


def read_text(name: str) -> str:
    """Return the text of a file, or of the standard input for `-`.

    Raises:
        SavedFileError: it is missing, no regular file, too large, or not text.
    """
    try:
        stdin = name == "-"
        content = read_stream(sys.stdin.buffer, MOST_JSON_BYTES) if stdin else read_bytes(name, MOST_JSON_BYTES)
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SavedFileError(f"{shortened(name, LONGEST_NAME)}: is no UTF-8 text") from error
    except UnreadableError as error:
        raise SavedFileError(f"{shortened(name, LONGEST_NAME)}: {error}") from error


def read_plan(name: str) -> Plan:
    """Return a plan that `lora-fx plan --format json` wrote.

    Raises:
        SavedFileError: it is missing or not a plan.
    """
    try:
        return Plan.from_json(read_text(name))
    except PlanFileError as error:
        advice = "write one with lora-fx plan … --format json -o FILE"
        raise SavedFileError(f"{shortened(name, LONGEST_NAME)}: {error}\n  {advice}") from error
