"""What the soak has found, each as the smallest case of its kind: the scheduler and the checker agree on it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from test_pressure import Desk, Shelf, names

from qvg_paged.scheduler import FairShare, TenantSpec

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.checker import Checker, check_log  # noqa: E402


def fair_desk(slots: int) -> Desk:
    return Desk(Shelf(1000), FairShare(), max_running=slots, pool_second_cost=0.0)


def finish(desk: Desk) -> None:
    while desk.scheduler.busy:
        desk.step()


def broken_rules(lines: list[str]) -> set[str]:
    """Invariants that a log violates, whatever has not drained yet."""
    checker = Checker()
    for line in lines:
        checker.feed(line)
    return {violation.invariant for violation in checker.violations}


def test_tenants_that_come_back_together_from_idling_start_level() -> None:
    desk = fair_desk(slots=1)
    desk.submit("alone", 30, tenant="was-busy")
    finish(desk)
    for place in range(20):
        for tenant in ("was-idle", "was-busy"):
            desk.submit(f"{tenant}-{place}", 1, tenant=tenant)
    desk.steps(10)
    served = desk.scheduler.service("was-busy") - 30.0, desk.scheduler.service("was-idle")
    assert served == pytest.approx((4.5, 4.5), abs=1.0), "what one had while the other wanted nothing is no debt"
    finish(desk)
    assert check_log(desk.lines) == []


def test_who_was_let_in_at_once_every_time_is_not_behind() -> None:
    desk = fair_desk(slots=3)
    desk.submit("long", 60, tenant="much")
    desk.submit("longer", 60, tenant="much")
    for place in range(20):
        desk.submit(f"short{place}", 1, tenant="little")
        desk.step()
    before = desk.scheduler.service("much"), desk.scheduler.service("little")
    for place in range(40):
        for tenant in ("much", "little"):
            desk.submit(f"{tenant}-{place}", 1, tenant=tenant)
    desk.steps(15)
    had = desk.scheduler.service("much") - before[0], desk.scheduler.service("little") - before[1]
    assert abs(had[0] - had[1]) <= 6.0, "three slots of one chunk, twice"
    finish(desk)
    assert check_log(desk.lines) == []


def test_who_came_in_without_room_on_the_host_stays_when_the_quota_sinks() -> None:
    desk = Desk(Shelf(40, host=20))
    for name, frames in (("first", 20), ("second", 9), ("third", 8)):
        desk.submit(name, frames)
    desk.steps(2)
    promised = {row[0]: row[3] for row in last_plan(desk.lines)["running"]}
    assert promised == {"first": 2, "second": 9, "third": 8}, "two are promised their worst, as they cannot be parked"
    desk.scheduler.cancel("first")
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=12))
    desk.step()
    assert desk.running() == ["second", "third"], "the host has room for both now, and neither was told so in time"
    finish(desk)
    assert check_log(desk.lines) == []


def test_who_has_a_place_on_the_host_must_go_however_many_wait() -> None:
    desk = Desk(Shelf(30, host=20), max_running=2)
    for name in ("first", "second", "waits", "waits too"):
        desk.submit(name, 10)
    desk.steps(4)
    desk.scheduler.set_tenant("t", TenantSpec(ceiling_nbytes=8))
    assert names(desk.step().parked) == ["second"]
    assert broken_rules(desk.lines) == set()
    at = next(place for place, line in enumerate(desk.lines) if '"parked":[["second"' in line)
    told = json.loads(desk.lines[at])
    told["parked"], told["running"] = [], [*told["running"], ["second", 4, 1, 5]]
    assert "quota" in broken_rules([*desk.lines[:at], json.dumps(told)])


def last_plan(lines: list[str]) -> dict[str, Any]:
    return next(record for record in map(json.loads, reversed(lines)) if record["kind"] == "plan")
