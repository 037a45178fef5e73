"""How long a call takes: device time by CUDA events, or wall time; medians with their spread.

On a GPU the device is kept busy while the calls are queued, so that device time holds no waits for the host; what the
host pays for a call is kept apart. A call gets the number of the input set it works on: sets rotate, so that caches do
not hold what an engine would read from memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SLEEP_HERTZ", "Clock", "Samples", "Timing", "quantile", "summary"]

Call = Callable[[int], Any]
SLEEP_HERTZ = 2e9
"""Cycles a second of the kernel that keeps the device busy, at most."""
MAX_HEAD_START = 0.03


@dataclass(frozen=True)
class Timing:
    """One measurement.

    Attributes:
        median_ms, p10_ms, p90_ms: of `count` calls.
        count: timed calls.
        host_us: median time the host spends in a call before it returns; None where that is the whole call.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    count: int
    host_us: float | None = None


@dataclass(frozen=True)
class Samples:
    """Times of single calls.

    Attributes:
        milliseconds: of each.
        host: seconds the host spent in each before it returned; None where that is the whole call.
    """

    milliseconds: list[float]
    host: list[float] | None = None

    def __add__(self, more: "Samples") -> "Samples":
        """Both of the same system."""
        host = None if self.host is None or more.host is None else self.host + more.host
        return Samples(self.milliseconds + more.milliseconds, host)

    def timing(self) -> Timing:
        """Median and spread."""
        return summary(self.milliseconds, self.host)


def quantile(sorted_values: list[float], share: float) -> float:
    """Value below which `share` of the sorted values lie, interpolated."""
    place = share * (len(sorted_values) - 1)
    low = int(place)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (place - low) * (sorted_values[high] - sorted_values[low])


def summary(milliseconds: list[float], host: list[float] | None = None) -> Timing:
    """Median and spread of times in milliseconds; `host` in seconds."""
    values = sorted(milliseconds)
    median, p10, p90 = (quantile(values, share) for share in (0.5, 0.1, 0.9))
    return Timing(median, p10, p90, len(values), None if host is None else quantile(sorted(host), 0.5) * 1e6)


@dataclass(frozen=True)
class Clock:
    """Times calls on one device.

    Attributes:
        device: what the calls run on.
        seconds: aimed at for the timed calls of one measurement.
        least, most: timed calls.
    """

    device: torch.device
    seconds: float = 0.04
    least: int = 5
    most: int = 100

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def device_time(self, run: Call, sets: int = 1) -> Timing:
        """Time on the device from a call's first launch to its last; on a CPU, wall time."""
        return self.device_samples(run, sets).timing()

    def wall_time(self, run: Call, sets: int = 1) -> Timing:
        """Time from a call until the device is done with it, one call at a time."""
        return self.wall_samples(run, sets).timing()

    def device_samples(self, run: Call, sets: int = 1) -> Samples:
        """As `device_time`, every call."""
        if self.device.type != "cuda":
            return self.wall_samples(run, sets)
        count, host = self._rehearse(run, sets)
        events = [(_event(), _event()) for _ in range(count)]
        costs = []
        torch.cuda._sleep(int(min(count * host * 1.2, MAX_HEAD_START) * SLEEP_HERTZ))
        for number, (start, end) in enumerate(events):
            start.record()
            before = time.perf_counter()
            run(number % sets)
            costs.append(time.perf_counter() - before)
            end.record()
        self.synchronize()
        return Samples([start.elapsed_time(end) for start, end in events], costs)

    def wall_samples(self, run: Call, sets: int = 1) -> Samples:
        """As `wall_time`, every call."""
        count, _ = self._rehearse(run, sets)
        times = []
        for number in range(count):
            self.synchronize()
            before = time.perf_counter()
            run(number % sets)
            self.synchronize()
            times.append((time.perf_counter() - before) * 1e3)
        return Samples(times)

    def _rehearse(self, run: Call, sets: int) -> tuple[int, float]:
        """Warm up; how many calls to time, and seconds the host spends in one."""
        run(0)
        self.synchronize()
        start = time.perf_counter()
        run(sets - 1)
        host = time.perf_counter() - start
        self.synchronize()
        once = time.perf_counter() - start
        return max(self.least, min(self.most, int(self.seconds / max(once, 1e-6)))), host


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
