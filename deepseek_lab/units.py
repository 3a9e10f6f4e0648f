"""Numbers as a person would say them, with their unit.

Memory comes in two families: GiB (2^30 bytes: what allocators and tools count) and GB (10^9 bytes: what data sheets and
papers print). A text says which one it uses, and no function here changes from one to the other by itself.
"""

from __future__ import annotations

import math

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12

#: The two families, smallest unit first: name and size in bytes.
BYTE_FAMILIES = {
    "GiB": (("bytes", 1), ("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB)),
    "GB": (("bytes", 1), ("KB", KB), ("MB", MB), ("GB", GB), ("TB", TB)),
}
_COUNTS = (("", 1), ("K", 10**3), ("M", 10**6), ("B", 10**9), ("T", 10**12))
_FLOPS = tuple(
    (prefix + "FLOP", 10 ** (3 * i)) for i, prefix in enumerate(("", "K", "M", "G", "T", "P", "E", "Z", "Y"))
)
_DOLLARS = (("", 1), ("K", 10**3), ("M", 10**6), ("B", 10**9))
_SHORT_TIMES = (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0))


def format_bytes(amount: float, family: str = "GiB", digits: int = 1, unit: str | None = None) -> str:
    """Return bytes as text: `format_bytes(673_150_611_808)` is "626.9 GiB", with `family="GB"` it is "673.2 GB".

    family: "GiB" (powers of 1,024) or "GB" (powers of 1,000). unit: one unit of that family, to keep several texts
    alike; None takes the largest that leaves at least 1. Whole bytes have no decimals.
    Raises ValueError for an unknown family or unit.
    """
    names = _family(family)
    if unit is not None:
        sizes = dict(names)
        if unit not in sizes:
            raise ValueError(f"unit={unit!r} is not in the {family} family; choose one of {', '.join(sizes)}")
        names = ((unit, sizes[unit]),)
    number, name = _scaled(amount, names, digits)
    if name == "bytes":
        return "1 byte" if number == "1" else f"{number} bytes"
    return f"{number} {name}"


def byte_unit(largest: float, family: str = "GiB") -> tuple[str, int]:
    """Return the unit (name, size in bytes) in which an axis up to `largest` bytes reads best."""
    names = _family(family)
    return next(((name, size) for name, size in reversed(names) if largest >= 2 * size), names[0])


def format_count(amount: float, digits: int = 1) -> str:
    """Return a count as text, in thousands K, millions M, billions B and trillions T: 671,026,419,200 is "671.0 B"."""
    return " ".join(_scaled(amount, _COUNTS, digits)).strip()


def format_flops(amount: float, digits: int = 1) -> str:
    """Return floating-point operations as text: 250_456_000_000 is "250.5 GFLOP". A multiply-add counts as two."""
    return " ".join(_scaled(amount, _FLOPS, digits))


def format_seconds(seconds: float, digits: int = 1) -> str:
    """Return a duration as text: "120.9 µs", "14.8 ms", "19.9 s", "3 min 20 s", "5.5 h", "54.3 days"."""
    size = abs(_finite(seconds))
    if round(size / 3_600, digits) >= 48:
        return f"{seconds / 86_400:,.{digits}f} days"
    if round(size) >= 3_600:
        return f"{seconds / 3_600:,.{digits}f} h"
    if round(size, digits) >= 60:
        sign, whole = "-" if seconds < 0 else "", round(size)
        return f"{sign}{whole // 60} min {whole % 60} s"
    return "0 s" if size == 0 else " ".join(_scaled(seconds, _SHORT_TIMES, digits))


def format_dollars(amount: float) -> str:
    """Return dollars as text: "$0.27", "$2.00", "$87,072", "$5.576 M"."""
    sign, size = "-" if _finite(amount) < 0 else "", abs(amount)
    if size < 999.995:
        return f"{sign}${size:,.2f}"
    if size < 999_999.5:
        return f"{sign}${size:,.0f}"
    number, name = _scaled(size, _DOLLARS, 3)
    return f"{sign}${number} {name}"


def _family(family: str) -> tuple[tuple[str, int], ...]:
    if family not in BYTE_FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose 'GiB' (powers of 1,024) or 'GB' (powers of 1,000)")
    return BYTE_FAMILIES[family]


def _scaled(amount: float, units: tuple[tuple[str, float], ...], digits: int) -> tuple[str, str]:
    """Return (number, unit) in the largest unit that leaves at least 1; 1,023.99 MiB goes on as 1.0 GiB."""
    size, i = abs(_finite(amount)), 0
    while i + 1 < len(units) and round(size / units[i][1], digits) >= round(units[i + 1][1] / units[i][1]):
        i += 1
    name, unit = units[i]
    value = amount / unit
    whole = unit == 1 and value == int(value)
    return f"{value:,.0f}" if whole else f"{value:,.{digits}f}", name


def _finite(amount: float) -> float:
    if not math.isfinite(amount):
        raise ValueError(f"{amount} is not a finite number; there is no text for it")
    return amount
