"""When streams arrive: seconds from the start, ascending."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random

from qvg_paged.errors import ArgumentError

__all__ = ["ARRIVALS", "arrival_times", "read_trace"]

DAY = 600.0
"""Seconds of a simulated day."""


def _poisson(rng: Random, rate: float) -> Iterator[float]:
    return _gaps(lambda: rng.expovariate(rate))


def _bursts(rng: Random, rate: float, cv: float) -> Iterator[float]:
    shape = cv**-2
    return _gaps(lambda: rng.gammavariate(shape, 1 / (rate * shape)))


def _gaps(draw: "object") -> Iterator[float]:
    assert callable(draw)
    now = 0.0
    while True:
        now += draw()
        yield now


def _diurnal(rng: Random, rate: float) -> Iterator[float]:
    """Poisson whose rate swings by four fifths over a day, by thinning."""
    for now in _poisson(rng, 1.8 * rate):
        if rng.random() * 1.8 < 1 + 0.8 * math.sin(2 * math.pi * now / DAY):
            yield now


def _herd(rng: Random, rate: float, size: int = 32) -> Iterator[float]:
    """Everyone at once, again and again."""
    for now in _gaps(lambda: size / rate):
        yield from [now - size / rate + 1e-3 * rng.random()] * size


ARRIVALS = {
    "poisson": _poisson,
    "bursts-3": lambda rng, rate: _bursts(rng, rate, 3.0),
    "bursts-13": lambda rng, rate: _bursts(rng, rate, 13.0),
    "diurnal": _diurnal,
    "herd": _herd,
}
"""Arrival processes by name; each takes a generator and a mean rate per second."""


def arrival_times(kind: str, rng: Random, rate: float, count: int) -> list[float]:
    """`count` arrival times.

    Raises:
        ArgumentError: unknown kind.
    """
    if kind not in ARRIVALS:
        raise ArgumentError(f"arrivals: expected one of {', '.join(ARRIVALS)}, got {kind!r}")
    source = ARRIVALS[kind](rng, rate)
    return sorted(next(source) for _ in range(count))


def read_trace(path: Path) -> list[tuple[float, str, int]]:
    """Time, tenant and frames of each line of a CSV file with these three columns, by time.

    Raises:
        ArgumentError: a line is not that; the message names it.
    """
    rows: list[tuple[float, str, int]] = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if number == 1 and row[:1] == ["time"]:
                continue
            try:
                time, tenant, frames = float(row[0]), row[1], int(row[2])
            except (IndexError, ValueError):
                time, tenant, frames = math.nan, "", 0
            if not (0 <= time < math.inf and tenant and frames > 0):
                raise ArgumentError(f"trace: expected time,tenant,frames in line {number} of {path.name}, got {row}")
            rows.append((time, tenant, frames))
    return sorted(rows)
