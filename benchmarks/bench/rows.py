"""A row: one shape, the systems compared on it, each behind a correctness gate; what became of it as plain data."""

import gc
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import torch

from bench.roofline import Ceilings, Work
from bench.timing import Clock, Samples, Timing

__all__ = ["Case", "Gate", "System", "median_ms", "run_case"]

TOLD = 160


@dataclass(frozen=True)
class Gate:
    """Verdict on a result before it is timed.

    Attributes:
        passed: whether `error` is allowed.
        error: of the result.
        allowed: what the same computation in the same number type has, with the tolerance's factor.
        against: what it was compared with.
    """

    passed: bool
    error: float
    allowed: float
    against: str


@dataclass(frozen=True)
class System:
    """One contender.

    Attributes:
        name: in tables.
        run: computes the result for an input set.
        work: least work of this way of storing the inputs.
        check: verdict on the result for input set 0; None only for references that the others are checked against.
        sets: input sets that rotate.
        wall: time calls one by one to their end on the device, host included.
        timing: measured already, in a way of its own; `run` is not called then.
        ours: part of this library: an error of it fails the run.
        notes: facts for the row.
    """

    name: str
    run: Callable[[int], Any]
    work: Work | None = None
    check: Callable[[Any], Gate] | None = None
    sets: int = 1
    wall: bool = False
    timing: Timing | None = None
    ours: bool = False
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row to be measured.

    Attributes:
        part: attention, encode, decode or manager.
        name: unique within the part.
        shape: sizes, for the record.
        systems: makes the contenders one after another; the first named `baseline` is what the plot's bars refer to.
        baseline: name of a system.
        bounds: names of `bench.bounds.BOUNDS` that this row counts for.
        turns: the contenders are timed in so many turns, as a device that gets warm gets slower; 1 for one after
            another, each made when the one before is gone.
    """

    part: str
    name: str
    shape: dict[str, Any]
    systems: Callable[[], Iterable[System]]
    baseline: str
    bounds: tuple[str, ...] = ()
    turns: int = 1


def median_ms(row: dict[str, Any], *systems: str) -> float | None:
    """Least median of the named systems that have a time in `row`."""
    times = [
        found["timing"]["median_ms"] for name in systems if (found := row["systems"].get(name)) and found["timing"]
    ]
    return min(times) if times else None


def run_case(case: Case, clock: Clock, ceilings: Ceilings) -> dict[str, Any]:
    """Measure one row; whatever is raised ends up in it."""
    start = time.monotonic()
    row: dict[str, Any] = {
        "part": case.part, "name": case.name, "shape": case.shape, "baseline": case.baseline,
        "bounds": list(case.bounds), "systems": {}, "error": None,
    }  # fmt: skip
    waiting: list[System] = []
    try:
        for system in case.systems():
            found = row["systems"][system.name] = _checked(system, ceilings)
            if found["error"] is None and case.turns > 1:
                waiting.append(system)
            elif found["error"] is None:
                _time([system], row, clock)
    except Exception as error:
        row["error"] = _told(error)
    _time(waiting, row, replace(clock, seconds=clock.seconds / case.turns), case.turns)
    waiting.clear()
    gc.collect()
    row["seconds"] = round(time.monotonic() - start, 2)
    return row


def _checked(system: System, ceilings: Ceilings) -> dict[str, Any]:
    """A system's part of a row, without times; with an error if it failed its gate."""
    start = time.monotonic()
    found: dict[str, Any] = {
        "ours": system.ours, "timing": None, "gate": None, "error": None, "notes": system.notes,
        **_least(system.work, ceilings),
    }  # fmt: skip
    try:
        with torch.no_grad():
            if system.check is not None:
                gate = system.check(system.run(0))
                found["gate"] = asdict(gate)
                if not gate.passed:
                    found["error"] = f"wrong: error {gate.error:.3g}, allowed {gate.allowed:.3g}"
    except Exception as error:
        found["error"] = _told(error)
    found["gate_seconds"] = round(time.monotonic() - start, 2)  # kernels are compiled here
    return found


def _time(systems: list[System], row: dict[str, Any], clock: Clock, turns: int = 1) -> None:
    """Time systems in turns; an error costs its system only."""
    samples: dict[str, list[Samples]] = {system.name: [] for system in systems}
    for system in systems * turns:
        found = row["systems"][system.name]
        if found["error"] is None and system.timing is None:
            try:
                with torch.no_grad():
                    time_by = clock.wall_samples if system.wall else clock.device_samples
                    samples[system.name].append(time_by(system.run, system.sets))
            except Exception as error:
                found["error"] = _told(error)
    for system in systems:
        found = row["systems"][system.name]
        if found["error"] is None:
            timing = system.timing or reduce(add, samples[system.name]).timing()
            found |= {"timing": asdict(timing), **_rates(timing, system.work, found)}


def _least(work: Work | None, ceilings: Ceilings) -> dict[str, Any]:
    if work is None:
        return {}
    least = {"least_ms": ceilings.least_ms(work), "binds": ceilings.binds(work)}
    return {"flops": work.flops, "nbytes": work.nbytes, "product": work.product, **least}


def _rates(timing: Timing, work: Work | None, found: dict[str, Any]) -> dict[str, float]:
    if work is None:
        return {}
    seconds = timing.median_ms / 1e3
    return {
        "tflops": work.flops / seconds / 1e12, "gbytes_per_s": work.nbytes / seconds / 1e9,
        "roofline_share": found["least_ms"] / timing.median_ms,
    }  # fmt: skip


def _told(error: Exception) -> str:
    """One line that says what and where."""
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({where[-1].filename.rsplit('/', 1)[-1]}:{where[-1].lineno})" if where else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= TOLD else text[:TOLD] + ' ...'}{place}"
