"""A bill that can be opened: every amount with its formula, the config keys it used and its source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deepseek_lab.units import format_bytes, format_count, format_dollars, format_flops, format_seconds

_SPOKEN = {"bytes": format_bytes, "FLOP": format_flops, "seconds": format_seconds, "$": format_dollars}


@dataclass(frozen=True)
class Line:
    """One amount: `amount` in `unit`, by `formula` (numbers filled in), from the config `keys`, as `source` says."""

    part: str
    amount: int | float
    unit: str
    formula: str = ""
    keys: tuple[str, ...] = ()
    source: str = ""

    def __post_init__(self):
        _check_name(self.part)
        if isinstance(self.amount, bool) or not isinstance(self.amount, (int, float)) or not math.isfinite(self.amount):
            raise ValueError(f"amount={self.amount!r} of {self.part!r} is not a finite number; give an int or a float")
        if not self.unit:
            raise ValueError(f"{self.part!r} has no unit; say what its {self.amount:,} are")

    @property
    def total(self) -> int | float:
        return self.amount


@dataclass(frozen=True, repr=False)
class Ledger:
    """A named group of lines and smaller ledgers, all in one unit, whose amounts add up exactly.

    `ledger.total` is the sum (an int while all amounts are), `ledger["attention/o_proj"]` one entry and `ledger.rows()`
    the lines as dictionaries. Printed it is a table; in a notebook every number opens to its formula and source.
    Raises ValueError for different units, for two entries of one name and for no entries.
    """

    part: str
    lines: tuple[Line | Ledger, ...]
    note: str = ""

    def __post_init__(self):
        _check_name(self.part)
        object.__setattr__(self, "lines", tuple(self.lines))
        if not self.lines:
            raise ValueError(f"{self.part!r} has no lines; a ledger needs at least one")
        names = [line.part for line in self.lines]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.part!r} has two entries called {', '.join(twice)}; give each its own name")
        units = {line.unit: line.part for line in self.lines}
        if len(units) > 1:
            parts = " and ".join(f"{part!r} in {unit}" for unit, part in units.items())
            raise ValueError(f"{self.part!r} adds {parts}; a ledger adds one unit, so convert them first")

    @property
    def unit(self) -> str:
        return self.lines[0].unit

    @property
    def total(self) -> int | float:
        return sum(line.total for line in self.lines)

    def __getitem__(self, path: str) -> Line | Ledger:
        """Return the entry at a path such as "experts/routed experts"; raises KeyError listing what is there."""
        name, _, rest = path.partition("/")
        found = next((line for line in self.lines if line.part == name), None)
        if found is None or (rest and isinstance(found, Line)):
            where, entries = (
                (found.part, "nothing below it") if found else (self.part, ", ".join(x.part for x in self.lines))
            )
            raise KeyError(f"{where!r} has no entry {(rest if found else name)!r}; it has: {entries}")
        return found[rest] if rest else found

    def __contains__(self, path: str) -> bool:
        try:
            self[path]
        except KeyError:
            return False
        return True

    def rows(self) -> list[dict]:
        """Return the lines, without subtotals, as dictionaries; their amounts add up to `total`."""
        return [
            dict(
                path=path, amount=line.amount, unit=line.unit, formula=line.formula, keys=line.keys, source=line.source
            )
            for path, _, line in self._walk()
            if isinstance(line, Line)
        ]

    def __str__(self) -> str:
        entries = [(0, self), *((depth, line) for _, depth, line in self._walk())]
        table = [("part", self.unit, "in short", "formula")]
        table += [
            ("  " * depth + entry.part, _amount_text(entry.total), _spoken(entry), getattr(entry, "formula", ""))
            for depth, entry in entries
        ]
        part, amount, short, _ = (max(map(len, column)) for column in zip(*table, strict=True))
        rows = [f"{a:<{part}}  {b:>{amount}}  {c:>{short}}  {d}".rstrip() for a, b, c, d in table]
        return "\n".join([*rows, *([self.note] if self.note else [])])

    __repr__ = __str__

    def __iter__(self) -> Iterator[Line | Ledger]:
        return iter(self.lines)

    def _repr_html_(self) -> str:
        from .ledger_html import ledger_html  # the page's looks are a second idea, in a second file

        return ledger_html(self)

    def _walk(self, prefix: str = "", depth: int = 1) -> Iterator[tuple[str, int, Line | Ledger]]:
        for line in self.lines:
            path = f"{prefix}{line.part}"
            yield path, depth, line
            if isinstance(line, Ledger):
                yield from line._walk(path + "/", depth + 1)


def grow(part: str, lines: Iterable[tuple[str, Line | Ledger]], note: str = "") -> Ledger:
    """Return the ledger whose branches are spelled by the paths: ("experts/gate", line) hangs under "experts"."""
    groups: dict[str, list] = {}
    leaves: dict[str, Line | Ledger] = {}
    for path, line in lines:
        head, _, rest = path.partition("/")
        leaves[head] = line
        groups.setdefault(head, []).append((rest, line))
    return Ledger(
        part, tuple(leaves[head] if below[0][0] == "" else grow(head, below) for head, below in groups.items()), note
    )


def _check_name(part: str) -> None:
    if not part or "/" in part:
        raise ValueError(
            f"part={part!r} cannot name an entry; choose a text without '/', which separates a path's names"
        )


def _amount_text(amount: int | float) -> str:
    return f"{amount:,}" if isinstance(amount, int) else f"{amount:,.6g}"


def _spoken(entry: Line | Ledger) -> str:
    """Return the amount as one would say it aloud: "626.9 GiB" for bytes, "671.0 B" for a count."""
    return _SPOKEN.get(entry.unit, format_count)(entry.total)
