"""Values of an event log as it lies there: any version may have written it, and a number that is not finite is text in it."""

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 1e60
"""Of a finite number: sums and squares of such numbers are finite too."""


def real(value: object) -> float:
    """Also of "nan" and "inf", as the log writes them; nan for what is no number, or beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return math.nan if LARGEST < abs(number) < math.inf else number


def at(values: object, *path: str) -> Any:
    """What lies at a path of keys; None where it ends."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values
