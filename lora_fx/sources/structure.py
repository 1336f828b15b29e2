"""JSON of others as dataclasses: every field of the annotated type, none unknown, none missing."""

import functools
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lora_fx.sources.regular import UnreadableError

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
