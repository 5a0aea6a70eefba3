"""Numbers as people read them: with a unit of a fitting size."""

import math

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
    is_integer = scaled == 0 or (isinstance(value, int) and factor == 1)
    return f"{f'{int(scaled):,}' if is_integer else number(scaled, digits)}{f' {name}' if name else ''}"


def number(value: float, digits: int = 4) -> str:
    """So many significant digits, zeros at the end included; what is before the point is whole."""
    rounded = f"{value:.{digits - 1}e}"
    if abs(float(rounded)) >= 1e-3:
        return f"{value:,.{max(0, digits - 1 - int(rounded.partition('e')[2]))}f}"
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def size_text(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def parameters(count: float) -> str:
    """Return a model's size: '66.99M parameters'."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.4g}{name} parameters"
    return f"{count:,} parameters"


def duration(seconds: float) -> str:
    """Return '2 h 03 min', '4 min 05 s', '12.3 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    return f"{minutes} min {remainder:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def in_ms(seconds: float) -> str:
    return f"{three_digits(1e3 * seconds)} ms"


def three_digits(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:,.3g}" if value < 999.5 else f"{value:,.0f}"
