"""When streams arrive: seconds from the start, ascending."""

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from qvg_paged.errors import ArgumentError

__all__ = ["ARRIVALS", "Arrival", "arrival_times", "read_trace"]

DAY = 600.0
"""Seconds of a simulated day."""


class Arrival(NamedTuple):
    """A stream that comes: when, whose, how many frames, and after how many seconds its viewer leaves, if at all."""

    at: float
    tenant: str
    frames: int
    patience: float | None = None


def _poisson(rng: Random, rate: float) -> Iterator[float]:
    return _gaps(lambda: rng.expovariate(rate))


def _bursts(rng: Random, rate: float, cv: float) -> Iterator[float]:
    shape = cv**-2
    return _gaps(lambda: rng.gammavariate(shape, 1 / (rate * shape)))


def _gaps(draw: Callable[[], float]) -> Iterator[float]:
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


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals from a CSV file with the columns time, tenant, frames and, if wanted, patience; in order of time.

    Raises:
        ArgumentError: a line is not that; the message names it.
    """
    rows: list[Arrival] = []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            for number, row in enumerate(reader, 1):
                if not (number == 1 and row[:1] == ["time"]):
                    rows.append(_arrival(row, f"line {number} of {path.name}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ArgumentError(f"trace: expected a CSV file, got {path.name}: {error}") from None
    return sorted(rows, key=lambda arrival: arrival.at)


def _arrival(row: list[str], place: str) -> Arrival:
    try:
        found = Arrival(float(row[0]), row[1], int(row[2]), float(row[3]) if row[3:] and row[3] else None)
    except (IndexError, ValueError):
        found = Arrival(math.nan, "", 0)
    if not (0 <= found.at < math.inf and found.tenant and 0 < found.frames < 1 << 31 and (found.patience or 0) >= 0):
        shown = [cell[:20] for cell in row[:5]]
        raise ArgumentError(f"trace: expected time,tenant,frames[,patience] in {place}, got {shown}")
    return found
