"""JSON of others: bounded, without what Python reads and others do not."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from lora_fx.sources.regular import SURROGATE, UnreadableError, read_bytes

MOST_JSON_BYTES = 256 * 1024 * 1024
"""Of a document that describes a whole model."""
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(content: bytes | str) -> Any:
    """Return what a JSON text stands for.

    Raises:
        UnreadableError: it is not UTF-8, not JSON, nested too deeply, has a number of thousands of digits, a key twice,
            or half a character (a lone surrogate), which no file can hold.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_without_duplicates)
        if SURROGATE.search(text) or _ESCAPED_SURROGATE.search(text):
            json.dumps(document, ensure_ascii=False).encode()
    except UnreadableError:
        raise
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 text (byte {error.start:,})") from error
    except UnicodeEncodeError as error:
        raise UnreadableError("holds half a character (a lone surrogate)") from error
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise UnreadableError("is nested too deeply") from error
    except ValueError as error:  # Python reads no integer of more digits
        raise UnreadableError("holds a number of thousands of digits") from error
    return document


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnreadableError(f"holds the key {double[:60]!r} twice")
    return table


def read_json(path: str | os.PathLike[str], most: int = MOST_JSON_BYTES) -> Any:
    """Return what a JSON file stands for.

    Raises:
        UnreadableError: as `open_regular` and `parse_json`.
    """
    return parse_json(read_bytes(path, most))
