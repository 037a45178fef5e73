"""A run that went wrong, made as small as it stays wrong: for people to read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stress.checker import check_log
from stress.scenario import Scenario
from stress.simulator import Simulator

__all__ = ["Failure", "find_failure", "shrink"]


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        scenario, seed: of the run.
        step: plan at which it showed.
        invariant: its name; of an exception its class.
        text: what happened.
    """

    scenario: Scenario
    seed: int
    step: int
    invariant: str
    text: str


def find_failure(scenario: Scenario, seed: int) -> Failure | None:
    """The first thing that goes wrong in a run, or None."""
    simulator = Simulator(scenario, seed)
    try:
        run = simulator.run()
        violations = check_log(run.lines)
    except Exception as error:  # whatever the scheduler does on its way down
        return Failure(scenario, seed, simulator.result.steps, type(error).__name__, str(error)[:500])
    if violations:
        first = violations[0]
        step = sum('"kind":"plan"' in line for line in run.lines[: first.seq + 1])
        return Failure(scenario, seed, step, first.invariant, first.text)
    if not run.drained:
        return Failure(scenario, seed, run.steps, "drained", "streams are left")
    return None


def shrink(failure: Failure, tries: int = 60) -> Failure:
    """A smaller run that fails the same way: fewer streams, tenants, faults and frames, as long as one can be found."""
    best = failure
    improved = True
    while improved and tries > 0:
        improved = False
        for smaller in _smaller(best.scenario):
            tries -= 1
            found = find_failure(smaller, best.seed)
            if found is not None and found.invariant == best.invariant:
                best, improved = found, True
                break
            if tries <= 0:
                break
    return best


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    if scenario.least_events:
        yield replace(scenario, least_events=0)
    for count in (scenario.streams // 4, scenario.streams // 2, scenario.streams * 3 // 4, scenario.streams - 1):
        if 0 < count < scenario.streams and not scenario.trace:
            yield replace(scenario, streams=count)
    if len(scenario.trace) > 1:
        yield replace(scenario, trace=scenario.trace[: len(scenario.trace) // 2])
    if scenario.tenants > 1:
        yield replace(scenario, tenants=scenario.tenants // 2)
    for fault in scenario.faults:
        yield replace(scenario, faults={name: rate for name, rate in scenario.faults.items() if name != fault})
    least, most = scenario.frames
    if most > least:
        yield replace(scenario, frames=(least, (least + most) // 2))
    if scenario.varied:
        yield replace(scenario, varied=False)
