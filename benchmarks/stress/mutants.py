"""Planted bugs: one line of the scheduler is broken, and the checker has to find it from the event log.

Each mutant replaces one line in one function; the function is compiled anew and put wherever the old one is used. A
mutant counts as found if a run ends with a violation, with streams left, or with an exception.
"""

import importlib
import sys
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qvg_paged.scheduler import SchedulerConfig
from stress.checker import check_log
from stress.scenario import Scenario, draw_scenario
from stress.simulator import simulate

__all__ = ["GOAL", "MUTANTS", "Mutant", "find_mutant", "planted", "trade"]


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        module: of the scheduler.
        good, bad: a piece of its text, which occurs once, and what replaces it.
        about: what goes wrong.
    """

    module: str
    good: str
    bad: str
    about: str


MUTANTS = (
    Mutant("books", "demands.append(entry.need)", "pass", "a newcomer's bytes are not counted"),
    Mutant("admission", "held + entry.need_nbytes > ceiling", "held > ceiling", "quota forgets the newcomer"),
    Mutant("books", "self.demand += entry.need", "pass", "what is admitted is not added to the books"),
    Mutant("books", "stalls=entry.stalls + 1", "stalls=0", "parks are not counted"),
    Mutant("books", "len(self.state.running) >= slots", "len(self.state.running) > slots", "one stream too many"),
    Mutant("state", "del self.running[entry.id]", "pass",
           "a parked stream goes on running"),
    Mutant("admission", "_make_way(books, advice, ready)", "False", "floors and policies cannot make way"),
    Mutant("admission", "out = {decision.stream_id for decision in books.parked}", "out = set()",
           "parked and resumed in one step"),
    Mutant("admission", "chunks_before=entry.chunks", "chunks_before=-9", "no minimum residency"),
    Mutant("admission", "barred.update(_mates(books, ready))", "first = entry",
           "one tenant's quota blocks all tenants"),
    Mutant("pressure", "if not over and books.fits():", "if True:",
           "nobody is parked when streams grow"),
    Mutant("pressure", "ceiling is None else books.held(tenant) - ceiling", "True else 0",
           "a lowered quota is ignored"),
    Mutant("snapshot", "and name != leader ", "", "the leader may be parked"),
    Mutant("snapshot", "and entry.stalls < most", "", "parked without end"),
    Mutant("core", "entry is None or entry.chunks > state.leader_chunks", "True", "the leader changes every step"),
    Mutant("core", "if not state.leader and state.running:", "if False:", "nobody leads"),
    Mutant("core", "virtual_time + cost / tenant.weight", "virtual_time", "service is not charged"),
    Mutant("core", "min(start + most, request.frames)", "start + most", "more frames than asked for"),
    Mutant("core", "if not e.decision.reason.is_refusal", "if False", "ends are not announced"),
    Mutant("inputs", "entry.backed, committed=committed", "entry.backed, committed=entry.committed",
           "progress is lost"),
    Mutant("inputs", "chunks=entry.chunks + 1, stalls=0", "chunks=entry.chunks", "finished chunks are not counted"),
    Mutant("inputs", "if not entry.state.is_final:", "if entry.state is StreamState.QUEUED:",
           "running streams cannot be cancelled"),
    Mutant("inputs", "if not cache.can_host([entry.worst]):", "if False:", "accepts what can never fit"),
    Mutant("inputs", "rules.need(\n                entry, entry.backed, committed=committed",
           "entry.but(\n                committed=committed", "growth is not reserved"),
    Mutant("guard", "return self.faults >= self._strikes", "return False", "a bad policy is asked for ever"),
)  # fmt: skip
"""Twenty-five bugs."""

GOAL = (
    Scenario(policy="fair-share", streams=80, tenants=4, load=4.0, arrivals="herd", pool_streams=6.0,
             config=SchedulerConfig(max_running=4)),
    Scenario(policy="priority", streams=40, pool_streams=2.5, load=3.0, frames=(6, 60),
             faults={"chunk fails": 0.3, "out of memory": 0.2, "quota changes": 0.1, "pool shrinks": 0.1},
             config=SchedulerConfig(max_running=6, min_chunks=2)),
    Scenario(policy="evicts-the-leader", streams=40, pool_streams=2.5, load=3.0,
             faults={"chunk fails": 0.6, "out of memory": 0.5, "pool shrinks": 0.3},
             config=SchedulerConfig(policy_strikes=1000)),
    Scenario(policy="priority", streams=40, pool_streams=4.0, load=3.0, floor=0.5, tenants=2),
    Scenario(policy="evicts-the-leader", streams=60, pool_streams=5.0, load=1.0, frames=(12, 60), tenants=2,
             faults={"chunk fails": 0.9, "out of memory": 0.8, "pool shrinks": 0.6},
             config=SchedulerConfig(policy_strikes=1000, max_parks=1, hold_steps=0, headroom=0.0)),
    Scenario(policy="fcfs", streams=60, tenants=2, pool_streams=8.0, load=1.5,
             faults={"quota changes": 0.3}, frames=(24, 60)),
)  # fmt: skip
"""Runs that press where the bugs are, before random ones."""


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The scheduler with the bug in it, for the time of the context.

    Raises:
        LookupError: the text to be replaced does not occur exactly once.
    """
    module = importlib.import_module(f"qvg_paged.scheduler.{mutant.module}")
    source = Path(str(module.__file__)).read_text()
    if source.count(mutant.good) != 1:
        raise LookupError(f"{mutant.module}: expected once, found {source.count(mutant.good)} times: {mutant.good}")
    with trade(module, source.replace(mutant.good, mutant.bad)):
        yield


@contextmanager
def trade(module: types.ModuleType, source: str) -> Iterator[None]:
    """A module's functions with the code of another version of it, for the time of the context."""
    scope: dict[str, object] = {"__name__": module.__name__}
    exec(compile(textwrap.dedent(source), str(module.__file__), "exec"), scope)
    codes = _functions(vars(module), scope)
    old = [(function, function.__code__) for function, _ in codes]
    for function, other in codes:
        function.__code__ = other.__code__
    try:
        yield
    finally:
        for function, code in old:
            function.__code__ = code


def _functions(
    old: "dict[str, object]", new: "dict[str, object]"
) -> list[tuple[types.FunctionType, types.FunctionType]]:
    """Functions and methods of a module and of its other version that can trade their code."""
    pairs = []
    for name, thing in old.items():
        other = new.get(name)
        if isinstance(thing, types.FunctionType) and isinstance(other, types.FunctionType):
            if thing.__module__ == new["__name__"]:
                pairs.append((thing, other))
        elif isinstance(thing, type) and isinstance(other, type) and thing.__module__ == new["__name__"]:
            pairs += _functions(_members(thing), {**_members(other), "__name__": new["__name__"]})
    return [(a, b) for a, b in pairs if len(a.__code__.co_freevars) == len(b.__code__.co_freevars)]


def _members(thing: type) -> dict[str, object]:
    """Members of a class, and of properties and class methods the function inside."""
    inside = {property: "fget", cached_property: "func", classmethod: "__func__", staticmethod: "__func__"}
    return {name: getattr(value, inside.get(type(value), ""), value) for name, value in vars(thing).items()}


def find_mutant(mutant: Mutant, seeds: int = 40) -> str:
    """How a bug was found, or nothing."""
    with planted(mutant):
        runs = [(scenario, seed) for seed, scenario in enumerate(GOAL)]
        runs += [(draw_scenario(seed), seed) for seed in range(seeds)]
        for scenario, seed in runs:
            try:
                run = simulate(scenario, seed)
                violations = check_log(run.lines)
            except Exception as error:
                return f"seed {seed}: {type(error).__name__}: {error}"
            if violations:
                return f"seed {seed}: {violations[0].invariant}: {violations[0].text}"
    return ""


def main() -> int:
    """All of them; exit status 1 if one was not found."""
    missed = 0
    for mutant in MUTANTS:
        how = find_mutant(mutant)
        missed += not how
        print(f"{'found ' if how else 'MISSED'}  {mutant.about}: {how[:150]}")
    print(f"{len(MUTANTS) - missed} of {len(MUTANTS)} planted bugs found")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
