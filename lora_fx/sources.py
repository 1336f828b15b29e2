"""What comes from others is read here: files that are regular and of bounded size, and JSON.  Knows nothing of LoRA.

A path that is a pipe, a device or a directory is refused before it is opened, so that nothing waits or never ends; what
is longer than it may be is refused before it is read.
"""

import functools
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

MOST_JSON_BYTES = 256 * 1024 * 1024
"""Of a document that describes a whole model."""
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """Something cannot be read; the text says why in words that follow the name of the file."""


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> IO[bytes]:
    """Return a regular file opened for reading; a link to one is one.

    Args:
        path: of the file.
        most: number of bytes that it may have; None for any.

    Raises:
        UnreadableError: it is missing, of another kind, too large, or no path at all; nothing was read.
    """
    try:
        _check(os.stat(path), most)
        file = open(path, "rb", opener=_opened)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {_reason(path, error)}") from error
    except UnreadableError:
        raise
    except ValueError as error:  # a NUL, or a surrogate that stands for no byte
        raise UnreadableError("is no path of a file") from error
    try:
        _check(os.fstat(file.fileno()), most)  # what was opened may be another file than what was looked at
    except UnreadableError:
        file.close()
        raise
    return file


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAITING)


def _check(status: os.stat_result, most: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = next((words for test, words in _KINDS if test(status.st_mode)), "something else")
        raise UnreadableError(f"is {kind}, not a file")
    if most is not None and status.st_size > most:
        raise UnreadableError(f"has {status.st_size:,} bytes; at most {most:,} are read")


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "the link leads nowhere" if os.path.islink(path) else "no such file"
    return os.strerror(error.errno) if error.errno else str(error)


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Return what a regular file of at most so many bytes holds.

    Raises:
        UnreadableError: as `open_regular`, or reading fails.
    """
    with open_regular(path, most) as file:
        return read_stream(file, most)


def read_stream(stream: IO[bytes], most: int) -> bytes:
    """Return what an open file, or the standard input, still holds.

    Raises:
        UnreadableError: reading fails, or there is more than so many bytes.
    """
    try:
        content = stream.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from error
    if len(content) > most:
        raise UnreadableError(f"has more than {most:,} bytes")
    return content


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a file or folder could be there, whatever is.

    Raises:
        UnreadableError: no file can have such a path: it is too long, a circle of links, or has a NUL in it.
    """
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UnreadableError(f"cannot be reached: {_reason(path, error)}") from error
    except ValueError as error:
        raise UnreadableError("is no path of a file") from error


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, or a link to one; never an exception, whatever the path."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def is_inside(name: str, suffix: str = "") -> bool:
    """Whether a name that a file gives is that of a visible file beside it: no folder, no `..`, nothing absolute."""
    plain = not any(character in name for character in "/\\:\0") and not _SURROGATE.search(name)
    return plain and bool(name) and not name.startswith(".") and name.endswith(suffix)


# -- JSON


def parse_json(content: bytes | str) -> Any:
    """Return what a JSON text stands for.

    Raises:
        UnreadableError: it is not UTF-8, not JSON, nested too deeply, has a number of thousands of digits, a key twice,
            or half a character (a lone surrogate), which no file can hold.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_without_duplicates)
        if _SURROGATE.search(text) or _ESCAPED_SURROGATE.search(text):
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
    return parse_json(read_bytes(Path(path), most))


# -- JSON as dataclasses

T = TypeVar("T")
MOST = 2**63
"""No number of anything is so large, and no tensor can have such a size."""


class _MismatchError(Exception):
    """A value is not what an annotation says."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[str] = []


def structured(kind: type[T], document: object, name: str) -> T:
    """Return the dataclass that a JSON document holds: every field of the annotated type, none unknown, none missing.

    Numbers are finite and below 2**63, integers not negative.

    Args:
        kind: a dataclass whose annotations are of bool, int, float, str, Literal, tuples, mappings, optional values,
            and of dataclasses of these.
        document: what was read.
        name: what messages call it.

    Raises:
        UnreadableError: it holds something else; says where.
    """
    try:
        read: T = _read(kind, document)
    except _MismatchError as error:
        raise UnreadableError(f"{name}{''.join(reversed(error.path))} {error}") from None
    return read


@functools.cache
def _fields_of(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Return (type, whether it must be given) of the fields of a dataclass."""
    hints = get_type_hints(kind)
    return {f.name: (hints[f.name], f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)}


def _read(kind: Any, value: Any) -> Any:
    if kind in _PLAIN:
        words, fits = _PLAIN[kind]
        return value if fits(value) else _wrong(words, value)
    if is_dataclass(kind):
        return _record(kind, value)
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if isinstance(value, str) and value in inside else _wrong(f"one of {', '.join(inside)}", value)
    if origin in (Union, UnionType):
        return None if value is None else _read(next(part for part in inside if part is not NoneType), value)
    if origin is tuple:
        return _row(inside, value)
    if not isinstance(value, dict):
        _wrong("an object", value)
    return {key: _inside(f".{key[:60]}", inside[1], item) for key, item in value.items()}


def _row(inside: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong("a list", value)
    kinds = (inside[0],) * len(value) if inside[1:] == (...,) else inside
    if len(kinds) != len(value):
        _wrong(f"a list of {len(kinds)}", value)
    return tuple(_inside(f"[{at}]", kind, item) for at, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _record(kind: Any, value: Any) -> Any:
    known = _fields_of(kind)
    if not isinstance(value, Mapping):
        _wrong("an object", value)
    unknown = next((key for key in value if key not in known), None)
    if unknown is not None:
        raise _MismatchError(f"has the key {unknown[:60]!r}, which is unknown here")
    missing = next((key for key, (_, needed) in known.items() if needed and key not in value), None)
    if missing is not None:
        raise _MismatchError(f"lacks {missing!r}")
    return kind(**{key: _inside(f".{key}", known[key][0], item) for key, item in value.items()})


def _inside(step: str, kind: Any, value: object) -> Any:
    try:
        return _read(kind, value)
    except _MismatchError as error:
        error.path.append(step)
        raise


def _wrong(words: str, value: object) -> Any:
    shown = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) >= MOST else repr(value)
    if isinstance(value, (list, dict)):
        shown = "a list" if isinstance(value, list) else "an object"
    raise _MismatchError(f"must be {words}, found {shown[:60]}")


_PLAIN: dict[Any, tuple[str, Any]] = {
    bool: ("true or false", lambda value: type(value) is bool),
    int: ("a whole number from 0 to 2**63 - 1", lambda value: type(value) is int and 0 <= value < MOST),
    float: (
        "a finite number",
        lambda value: type(value) in (int, float) and -MOST < value < MOST and math.isfinite(value),
    ),
    str: ("a text", lambda value: isinstance(value, str)),
    object: ("anything", lambda value: True),
}
