"""Numbers that a caller gives: True and False are none, and NaN is in no range."""

import math
from numbers import Real
from typing import Any


def is_whole(value: object, lowest: float = -math.inf, highest: float = math.inf) -> bool:
    """Whether it is an integer from the lowest to the highest."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def is_number(value: object, above: float = -math.inf, highest: float = math.inf) -> bool:
    """Whether it is a finite number above one and at most another.

    >>> is_number(0.5, above=0), is_number(0, above=0), is_number(10**400), is_number(True), is_number("1")
    (True, False, False, False, False)
    """
    if not isinstance(value, Real) or isinstance(value, bool):  # NumPy's are Real
        return False
    given: Any = value
    try:
        number = float(given)
    except OverflowError:
        return False
    return math.isfinite(number) and above < number <= highest
