"""Many seeds, each a scenario of its own, over all cores; what was done stays done, and what failed is tried again.

    python benchmarks/stress/soak.py --seeds 20000 --events 2000 --minutes 60
    python benchmarks/stress/soak.py ...                      # goes on where it stopped

Every seed draws its policy, geometry, load and faults, runs until so many events have happened and all streams have
drained, and must keep every invariant. Exit status 0 only if no seed failed.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from results_file import commit, device_name, result, write
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stress.checker import check_log
from stress.coverage import missing_faults, print_matrix, rows
from stress.scenario import draw_scenario
from stress.shrink import find_failure, shrink
from stress.simulator import simulate

__all__ = ["main", "run_seed", "run_seeds", "summarise"]

BATCH = 8


def run_seed(seed: int, events: int) -> dict[str, Any]:
    """One seed: what happened in it, and what failed, shrunk."""
    scenario = draw_scenario(seed, events)
    failure = None
    try:
        run = simulate(scenario, seed)
        violations = check_log(run.lines)
        if violations or not run.drained:
            failure = find_failure(scenario, seed)
    except Exception:  # found again and told
        failure = find_failure(scenario, seed)
        assert failure is not None, f"seed {seed} failed once and not again"
        return _failed(seed, shrink(failure))
    found: dict[str, Any] = {
        "seed": seed,
        "events": run.events,
        "steps": run.steps,
        "seconds": round(run.seconds, 3),
        "digest": run.digest[:16],
        "policy": scenario.policy,
        "fired": rows(run.fired),
    }
    return found if failure is None else {**found, **_failed(seed, shrink(failure))}


def _failed(seed: int, failure: Any) -> dict[str, Any]:
    told = {"step": failure.step, "invariant": failure.invariant, "text": failure.text}
    return {"seed": seed, "failure": {**told, "scenario": repr(failure.scenario)}}


def _run_batch(seeds: Sequence[int], events: int) -> list[dict[str, Any]]:
    gc.collect()
    return [run_seed(seed, events) for seed in seeds]


def run_seeds(seeds: Sequence[int], events: int, jobs: int, deadline: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Results as they come; no new seed begins after `deadline` (of `time.monotonic`)."""
    todo = iter([seeds[place : place + BATCH] for place in range(0, len(seeds), BATCH)])
    context = _context()
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_quiet, initargs=(str(Path(__file__).resolve().parents[1]),)
    ) as pool:
        running: set[Future[list[dict[str, Any]]]] = set()
        while True:
            while len(running) < 2 * jobs and time.monotonic() < deadline:
                batch = next(todo, None)
                if batch is None:
                    break
                running.add(pool.submit(_run_batch, batch, events))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()


def _context() -> multiprocessing.context.BaseContext:
    """Workers that need not import everything each for itself, where the system has such."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["stress.soak"])
    return context


def _quiet(folder: str) -> None:
    """A worker finds the harness, leaves the machine to others, too, and collects garbage between batches only."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    os.nice(5)
    gc.disable()


def summarise(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Totals of many seeds."""
    fired: Counter[tuple[str, str]] = Counter()
    for seed in found:
        fired.update({(row["fault"], row["phase"]): row["count"] for row in seed.get("fired", ())})
    good = [seed for seed in found if "failure" not in seed]
    ran = Counter((str(seed.get("commit", "")), str(seed.get("on", ""))) for seed in found)
    return {
        "seeds": len(found),
        "which": _stretches(sorted(seed["seed"] for seed in found)),
        "events": sum(seed["events"] for seed in good),
        "least_events": min((seed["events"] for seed in good), default=0),
        "steps": sum(seed["steps"] for seed in good),
        "virtual_seconds": sum(seed["seconds"] for seed in good),
        "faults": sum(fired.values()),
        "ran": [{"commit": at, "on": name, "seeds": count} for (at, name), count in sorted(ran.items())],
        "policies": dict(Counter(seed["policy"] for seed in good)),
        "failures": [seed for seed in found if "failure" in seed],
        "never_fired": missing_faults(fired),
        "coverage": rows(fired),
        "coverage_text": print_matrix(fired),
    }


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of ascending numbers without a gap."""
    starts = [place for place, number in enumerate(numbers) if not place or number != numbers[place - 1] + 1]
    stops = [*starts[1:], len(numbers)]
    return [(numbers[start], numbers[stop - 1]) for start, stop in zip(starts, stops, strict=False)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--events", type=int, default=2000, help="least events of a seed")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; go on another time")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--state", type=Path, default=Path("runs/soak/seeds.jsonl"), help="what is done, a line a seed")
    parser.add_argument("--json", type=Path, help="write a result file")
    options = parser.parse_args()

    options.state.parent.mkdir(parents=True, exist_ok=True)
    found = _read(options.state, options.events)
    seeds = range(options.first, options.first + options.seeds)
    todo = [seed for seed in seeds if "failure" in found.get(seed, {"failure": "not run yet"})]
    ran = {"commit": commit(), "on": device_name("cpu")}
    deadline = time.monotonic() + 60 * options.minutes
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress, options.state.open("a") as file:
        task = progress.add_task("seeds", total=len(seeds), completed=len(seeds) - len(todo), note="")
        for done in run_seeds(todo, options.events, options.jobs, deadline):
            found[done["seed"]] = row = {**done, **ran}
            file.write(json.dumps({"least": options.events, **row}) + "\n")
            file.flush()
            if "failure" in row:
                progress.console.print(f"seed {row['seed']}: {row['failure']}", markup=False)
            progress.update(task, advance=1, note=f"seed {row['seed']}")
    summary = summarise([found[seed] for seed in seeds if seed in found])
    print(summary["coverage_text"])
    print(f"{summary['seeds']} of {len(seeds)} seeds, {summary['events']} events, at least {summary['least_events']} "
          f"each, {summary['faults']} faults, {len(summary['failures'])} failures")  # fmt: skip
    if options.json:
        write(options.json, result(device="cpu", config=vars(options), results=summary))
    return int(bool(summary["failures"]))


def _read(path: Path, events: int) -> dict[int, dict[str, Any]]:
    """What earlier calls did with as many events; half a line at the end is left out."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.pop("least", None) == events:
            found[row["seed"]] = row
    return found


if __name__ == "__main__":
    sys.exit(main())
