"""Numbers as people read them: with a unit of a fitting size, and as the ticks of an axis."""

import itertools
import math
from collections.abc import Sequence

# unit -> (from this value on, factor, what it is called)
_PREFIXES: dict[str, list[tuple[float, float, str]]] = {
    "s": [(7200, 1 / 3600, "h"), (120, 1 / 60, "min"), (1, 1, "s"), (1e-3, 1e3, "ms"), (0, 1e6, "µs")],
    "share": [(0, 100, "%")],
    "tokens/s": [(1e6, 1e-6, "M tokens/s"), (1e4, 1e-3, "k tokens/s"), (0, 1, "tokens/s")],
    "J": [(1e6, 1e-6, "MJ"), (1e4, 1e-3, "kJ"), (0, 1, "J")],
    **{
        unit: [(2**30, 2**-30, f"GiB{per}"), (2**20, 2**-20, f"MiB{per}"), (2**10, 2**-10, f"KiB{per}"), (0, 1, f"B{per}")]
        for unit, per in {"bytes": "", "bytes/s": "/s", "bytes/update": "/update"}.items()
    },
    "flop/s": [(1e15, 1e-15, "PFLOP/s"), (1e12, 1e-12, "TFLOP/s"), (1e9, 1e-9, "GFLOP/s"), (0, 1, "FLOP/s")],
}


def readable(unit: str, largest: float) -> tuple[float, str]:
    """(factor, unit to print) for numbers up to `largest`: 0.012 s are 12 ms."""
    return next(
        ((factor, name) for start, factor, name in _PREFIXES.get(unit, []) if (abs(largest) or 1.0) >= start),
        (1.0, unit),
    )


def quantity(value: float, unit: str = "", digits: int = 4) -> str:
    """A number with its unit, to so many significant digits: '12.30 ms', '1.041 M tokens/s', '41.2%'; an int whole: '1,200'."""
    if not math.isfinite(value):
        return "not finite"
    factor, name = readable(unit, float(f"{value:.{digits - 1}e}"))  # 999.96 ms are 1.000 s
    scaled = value * factor
    if name == "%":
        return f"{scaled:.1f}%"
    whole = scaled == 0 or (isinstance(value, int) and factor == 1)
    return f"{f'{int(scaled):,}' if whole else number(scaled, digits)}{f' {name}' if name else ''}"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, zeros at the end included; what is before the point is whole."""
    rounded = f"{value:.{digits - 1}e}"
    if abs(float(rounded)) >= 1e-3:
        return f"{value:,.{max(0, digits - 1 - int(rounded.partition('e')[2]))}f}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, ascending; the first and last enclose [low, high].

    low = high gets room around it. Raises ValueError where low > high or one of them is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"wanted finite low <= high, got {low} and {high}")
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        room = abs(low) / 2 or 0.5
        low, high = (0.0, 2 * low) if low > 0 else (low - room, high + room)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 7) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high], ascending; only the powers, or some of them, where that is too many.

    Raises ValueError unless 0 < low < high < infinity.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"wanted finite 0 < low < high, got {low} and {high}")
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors, stride in (((1, 2, 5), 1), *(((1,), stride) for stride in range(1, len(powers) + 1))):
        ticks = [factor * 10.0**power for power in powers[::stride] for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= count:
            break
    return ticks


def tick_text(tick: float, ticks: Sequence[float]) -> str:
    """A label no longer than its neighbours need: 0.5 and 1.0 on one axis, 200k and 1M on another."""
    largest = max(abs(other) for other in ticks)
    if tick == 0:
        return "0"
    for start, power, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= start:
            return f"{tick / power:.10g}{suffix}"
    if largest < 1e-3:
        mantissa, _, exponent = f"{tick:.6e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    gaps = [abs(b - a) for a, b in itertools.pairwise(ticks)]
    logarithmic = len(gaps) > 1 and max(gaps) > 1.5 * min(gaps)
    if logarithmic or not gaps:
        return f"{tick:,.10g}"
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    return f"{tick:,.{decimals}f}"
