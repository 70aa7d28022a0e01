"""Numbers as a person reads them: three significant digits and an SI prefix."""

from __future__ import annotations

import math

NONE = "–"


def digits(value: float) -> str:
    """Three significant digits without an exponent: 1.23, 12.3, 123, 1230."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(float(f"{value:.3g}")))))
    return f"{value:.{places}f}"


def si(value: float | None, unit: str) -> str:
    """`12.3 µs`, `412 GFLOP/s`: a value with the SI prefix that leaves 1 to 999 before the point."""
    if value is None:
        return NONE
    if value == 0:
        return f"0 {unit}"
    prefixes = "pnµm kMGTPE"
    power = math.floor(math.log10(abs(float(f"{value:.3g}"))) / 3)
    power = min(max(power, -4), 6)
    prefix = prefixes[power + 4].strip()
    return f"{digits(value / 1000.0**power)} {prefix}{unit}"


def tick(value: float, unit: str) -> str:
    """An axis label, `10 µs`: si() without trailing zeros after the point."""
    amount, _, rest = si(value, unit).partition(" ")
    amount = amount.rstrip("0").rstrip(".") if "." in amount else amount
    return f"{amount} {rest}".strip()


def seconds(value: float | None) -> str:
    return si(value, "s")


def spread(low: float | None, high: float | None) -> str:
    """`12.1 – 12.9 µs`: an interval of times in one unit."""
    if low is None or high is None:
        return ""
    power = min(max(math.floor(math.log10(float(f"{high:.3g}")) / 3), -4), 0)
    unit = ("ps", "ns", "µs", "ms", "s")[power + 4]
    return f"{digits(low / 1000.0**power)}–{digits(high / 1000.0**power)} {unit}"


def times(value: float | None) -> str:
    """A speed ratio, `1.42×`; rounded away from 1.00, so that a loss never reads as a draw."""
    if value is None:
        return NONE
    shown = f"{value:.2f}" if value < 100 else digits(value)
    if value < 1 and float(shown) >= 1:
        shown = "0.99"
    return f"{shown}×"


def percent(value: float | None, places: int | None = None) -> str:
    """`83 %`; below ten percent with one place after the point, unless `places` says how many."""
    if value is None:
        return NONE
    shown = places if places is not None else 1 if 100 * value < 9.95 else 0
    return f"{100 * value:.{shown}f} %"


def error(value: float | None) -> str:
    """A relative error, `3.1e-07`."""
    return NONE if value is None else "0" if value == 0 else f"{value:.1e}"


def binary(value: float) -> str:
    """A memory size, `32 KiB`."""
    power = min(max(math.floor(math.log2(value) / 10), 0), 5) if value > 0 else 0
    return f"{value / 1024.0**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"
