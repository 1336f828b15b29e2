"""Integers of a module that a capture leaves open: a layer's number, which finds its part of a KV cache.

Two captures of identical blocks have shown that such an integer is all in which they differ (`differing`).  A capture
with it left open gives the forward a stand-in that can do two things: find an item of a list or dict among the
arguments, and be compared with a plain integer.  The one becomes `«place»` in the text of an access, or an input of the
graph where the item is set; of the other the guard asks that each value compares alike.  Any other use spoils the
capture, and each integer gets a graph of its own.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, NoReturn

from lora_fx.capture.reads.places import AttributePath


class UsedOtherwise(BaseException):
    """An open number was used as more than an index.  Not an Exception: a forward must not swallow it."""


class OpenNumbers:
    """The open numbers of one capture."""

    def __init__(self, places: frozenset[AttributePath], required: Callable[[str, str], None]) -> None:
        """Leave integers open that are read at these places; `required(expression, reason)` notes what must hold."""
        self.places = places
        self.required = required
        self.given: dict[AttributePath, OpenNumber] = {}
        """Those that the forward has read."""
        self.spoiled = False

    def of(self, place: AttributePath, value: Any) -> Any:
        """Return what the forward sees in the place of a value that it reads: a stand-in, or None for the value."""
        if place not in self.places or type(value) is not int or value < 0:
            return None
        if place not in self.given:
            self.given[place] = OpenNumber(self, place, value)
            self.given[place].require(f"{self.given[place].text} >= 0")  # -1 is an index too, of another item
        return self.given[place]

    def met(self, code: CodeType, values: Mapping[str, object]) -> None:
        """Code that asks `type` or `is` starts, with these arguments: it is spoiled if it may ask an open number."""
        names = {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}
        read = any(place.attributes[-1] in names for place in self.places)
        self.spoiled = self.spoiled or read or _holds_open(list(values.values()))


def _holds_open(value: object) -> bool:
    parts = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
    assert isinstance(parts, Iterable)
    return type(value) is OpenNumber or any(map(_holds_open, parts))


def _compares(name: str, symbol: str) -> Callable[[Any, object], Any]:
    def compare(self: "OpenNumber", other: object) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        if type(other) is not int:
            self.spoil()
        answer = getattr(operator, name)(self.value, other)
        self.require(f"({self.text} {symbol} {other}) is {answer}")
        return answer

    return compare


def _refused(self: "OpenNumber", *_args: Any, **_kwargs: Any) -> NoReturn:
    self.spoil()


class OpenNumber:
    """Stands for an integer; no subclass of int, since C would use the value of one without asking."""

    __slots__ = ("_owner", "_place", "text", "value")

    __class__ = property(lambda self: int)

    def __init__(self, owner: OpenNumbers, place: AttributePath, value: int) -> None:
        self._owner, self._place, self.value = owner, place, value
        self.text = f"«{place}»"

    def spoil(self) -> NoReturn:
        """It is used as more than an index.

        Raises:
            UsedOtherwise: always.
        """
        self._owner.spoiled = True
        raise UsedOtherwise(str(self._place))

    def is_not(self, other: object) -> None:
        """The item that this index, key or open number finds was reached otherwise: it must find another one."""
        value = other.value if type(other) is OpenNumber else other
        if value == self.value or isinstance(value, float):  # whose text may be no number: `nan`
            self.spoil()
        if isinstance(value, int):
            self.require(f"{self.text} != {other.text if type(other) is OpenNumber else value}")

    def require(self, expression: str) -> None:
        self._owner.required(expression, f"value of {self._place}")

    def __bool__(self) -> bool:
        self.require(f"bool({self.text}) is {bool(self.value)}")
        return bool(self.value)

    __eq__ = _compares("eq", "==")
    __ne__ = _compares("ne", "!=")
    __lt__ = _compares("lt", "<")
    __le__ = _compares("le", "<=")
    __gt__ = _compares("gt", ">")
    __ge__ = _compares("ge", ">=")
    __hash__ = _refused
    __getattr__ = _refused
    __repr__ = __str__ = __format__ = __reduce__ = __reduce_ex__ = _refused
    __index__ = __int__ = __float__ = __complex__ = __round__ = __trunc__ = __floor__ = __ceil__ = _refused
    __neg__ = __pos__ = __abs__ = __invert__ = _refused
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __divmod__ = __pow__ = _refused
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rdivmod__ = __rpow__ = _refused
    __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = __matmul__ = _refused
    __rand__ = __ror__ = __rxor__ = __rlshift__ = __rrshift__ = __rmatmul__ = _refused


def refuse_open(value: object) -> None:
    """Spoil a capture that would write an open number down as a constant."""
    if type(value) is OpenNumber:
        value.spoil()
