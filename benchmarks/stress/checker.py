"""Verifies a run from its event log alone: it imports nothing of the scheduler and trusts none of its words.

Bytes, states, leaders, service and waits are followed line by line; what the plans say is held against that. A
violation names the invariant and the line.
"""

import json
from collections.abc import Iterable
from typing import Any

from stress.ladder_checks import check_ladder, note_floors
from stress.ledger import FINAL, Ledger, Stream, Violation
from stress.room_checks import check_line, check_memory
from stress.service import Service

__all__ = ["Checker", "Violation", "check_log"]


class Checker:
    """Follows a log.

    Attributes:
        ledger: what is known so far.
        service: what tenants have had.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.service = Service(self.ledger)
        self._faults = 0
        self._draining = False
        self._calm = True
        self._seen_running: set[str] = set()
        self._handlers = {name[4:]: getattr(self, name) for name in dir(self) if name.startswith("_on_")}

    @property
    def violations(self) -> list[Violation]:
        """What was found so far."""
        return self.ledger.violations

    def feed(self, line: str) -> None:
        """The next line."""
        self.take(json.loads(line))

    def take(self, record: dict[str, Any]) -> None:
        """The next line, parsed."""
        ledger = self.ledger
        ledger.seq += 1
        right = record["v"] == 1 and record["seq"] == ledger.seq
        ledger.expect("log", right, f"line {ledger.seq} is {record['seq']}")
        handler = self._handlers.get(record["kind"])
        ledger.expect("log", handler is not None, f"unknown kind {record['kind']!r}")
        if handler is not None:
            handler(record)

    def finish(self) -> list[Violation]:
        """The end of the log: nothing may be left. All violations."""
        ledger = self.ledger
        left = {name: stream.state for name, stream in ledger.live.items()}
        ledger.expect("drained", not left, f"still there: {left}")
        ledger.expect("drained", not ledger.untold, f"ended, but no plan told the engine: {sorted(ledger.untold)}")
        self._check_fairness()
        return ledger.violations

    def services(self) -> dict[str, tuple[float, float]]:
        """Cost units and weight of each tenant."""
        return {name: (tenant.service, tenant.weight) for name, tenant in self.ledger.tenants.items()}

    def _check_fairness(self) -> None:
        opened = self.ledger.open
        if opened.get("policy") != "FairShare" or not self._calm or opened["config"]["overtakes"]:
            return
        gap, bound = self.service.largest_gap, 2 * self.service.unit
        self.ledger.expect("fairness", gap <= bound, f"service differs by {gap}, bound {bound}")

    def _on_open(self, record: dict[str, Any]) -> None:
        self.ledger.open = record

    def _on_policy(self, record: dict[str, Any]) -> None:
        strikes = self.ledger.open["config"]["policy_strikes"]
        self.ledger.expect("policy", self._faults < strikes, f"asked again after {self._faults} faults")
        right = (record["answer"] is None) == bool(record["fault"])
        self.ledger.expect("policy", right, "a wrong answer was used")
        self._faults += bool(record["fault"])

    def _on_submit(self, record: dict[str, Any]) -> None:
        ledger, name, reason = self.ledger, record["id"], record["reason"]
        ledger.expect("names", name not in ledger.live, f"{name!r} was in use")
        stream = Stream(record["tenant"], record["frames"], record["branches"], record["nbytes"])
        ledger.streams[name] = stream
        note_floors(ledger, record)
        if reason == "queued":
            ledger.accept(name, stream)
            ledger.expect("drain", not self._draining, f"{name!r} was accepted while draining")
            fits = stream.worst <= ledger.open["pool_nbytes"]
            ledger.expect("admission", fits, f"{name!r} can never fit and was accepted")
            return
        ledger.end(name, "refused", reason)
        known = reason in ("too large", "queue full", "draining")
        ledger.expect("reasons", known, f"{name!r} was refused as {reason!r}")

    def _on_cancel(self, record: dict[str, Any]) -> None:
        ledger, name = self.ledger, record["id"]
        stream = ledger.streams[name]
        if stream.state in FINAL:
            ledger.expect("transitions", record["reason"] != "queued", f"{name!r} rose from the dead")
            return
        ledger.expect("transitions", record["reason"] == "cancelled", f"{name!r} was not cancelled")
        ledger.end(name, "cancelled", "" if stream.state == "queued" else "cancelled")

    def _on_tenant(self, record: dict[str, Any]) -> None:
        ledger = self.ledger
        tenant = ledger.tenants[record["tenant"]]
        if tenant.weight != record["weight"]:
            self.service.forget()
            self._calm = self._calm and not ledger.planned and tenant.service == 0
        tenant.weight = record["weight"]
        tenant.ceiling, tenant.floor = record["ceiling_nbytes"], record["floor_nbytes"]
        tenant.lowest, tenant.least_kept = record["quality"]["rung"], record["quality"]["retrieval_frames"]
        floors = sum(t.floor for t in ledger.tenants.values())
        ledger.expect("quota", floors <= ledger.open["pool_nbytes"], "the floors exceed the pool")
        self._calm = self._calm and tenant.ceiling is None and not tenant.floor

    def _on_limit(self, record: dict[str, Any]) -> None:
        self.ledger.limit = record["nbytes"]
        self._calm = self._calm and self.ledger.limit is None

    def _on_drain(self, record: dict[str, Any]) -> None:
        self._draining = bool(record)

    def _on_shutdown(self, record: dict[str, Any]) -> None:
        self._draining = bool(record)
        for name in tuple(self.ledger.live):
            self._on_cancel({"id": name, "reason": "cancelled"})

    def _on_engine(self, record: dict[str, Any]) -> None:
        if record["event"] == "reserve":
            self.ledger.reserve = record["nbytes"]
        if record["event"] == "memory":
            self.ledger.expect("memory", record["fits"], "the engine ran out of memory")
            resident = len(self.ledger.places.running)
            self.ledger.expect("engine", record["open"] == resident, f"{record['open']} are open, {resident} run")

    def _on_plan(self, plan: dict[str, Any]) -> None:
        ledger = self.ledger
        ledger.expect("clock", plan["now"] >= ledger.now, "time ran backwards")
        seconds = min(plan["now"] - ledger.now, ledger.open["config"]["longest_charge"]) if ledger.held else 0.0
        ledger.now = plan["now"]
        self.service.charge(seconds)
        self._announce(plan)
        check_ladder(ledger, plan)
        self._move(plan)
        self._check_running(plan)
        self._check_leader(plan)
        check_memory(ledger, self._seen_running)
        check_line(ledger, plan)
        self._seen_running.update(ledger.planned)
        self.service.follow()

    def _announce(self, plan: dict[str, Any]) -> None:
        """Ends are told once, each to whom it concerns, with the right reason."""
        ledger = self.ledger
        told = [(name, reason, False) for name, reason in plan["finished"]]
        told += [(name, reason, True) for name, reason in plan["rejected"]]
        for name, reason, refused in told:
            stream = ledger.streams[name]
            right = stream.ending == reason and (stream.state == "refused") == refused
            ledger.expect("transitions", right, f"{name!r} ended as {reason!r}, expected {stream.ending!r}")
            stream.ending = ""
            ledger.untold.pop(name, None)
        untold = [name for name, s in ledger.untold.items() if s.state != "refused"]
        ledger.expect("transitions", not untold, f"ended, but the plan does not say so: {untold}")

    def _move(self, plan: dict[str, Any]) -> None:
        ledger, parked_now = self.ledger, {name for name, _ in plan["parked"]}
        for name, reason in plan["parked"]:
            self._check_park(name, reason)
            stream = ledger.streams[name]
            stream.state, stream.nbytes = "parked", 0
            ledger.places.park(name, reason)
        for key, before in (("resumed", "parked"), ("admitted", "queued")):
            for name in plan[key]:
                stream = ledger.streams[name]
                right = stream.state == before and name not in parked_now
                ledger.expect("transitions", right, f"{name!r} was {key}, it was {stream.state}")
                ledger.expect("cancel", stream.state not in FINAL, f"{name!r} ran after its end")
                ledger.places.start(name, room=ledger.host_nbytes)
                stream.state, stream.reason, stream.chunks_before = "running", "advance", stream.chunks

    def _check_park(self, name: str, reason: str) -> None:
        ledger, config, stream = self.ledger, self.ledger.open["config"], self.ledger.streams[name]
        ledger.expect("transitions", stream.state == "running", f"{name!r} was parked, it was {stream.state}")
        stuck = name == ledger.leader and stream.chunks == ledger.leader_chunks
        ledger.expect("leader", not stuck, f"the leader {name!r} was parked before it finished a chunk")
        ledger.expect("parking", ledger.parks, f"{name!r} was parked, though nobody may be")
        if reason == "parked":
            done = stream.chunks - stream.chunks_before
            ledger.expect("residency", done >= config["min_chunks"], f"{name!r} was parked after {done} chunks")
        stream.stalls += 1
        ledger.expect("parks", stream.stalls <= config["max_parks"], f"{name!r} was parked {stream.stalls} times")

    def _check_running(self, plan: dict[str, Any]) -> None:
        ledger = self.ledger
        listed = [row[0] for row in plan["running"]]
        running = ledger.places.running
        right = len(listed) == len(running) and set(listed) == running.keys()
        ledger.expect("transitions", right, f"the plan runs {sorted(listed)}, expected {sorted(running)}")
        ledger.planned, ledger.held = {}, []
        for name, start, count, nbytes in plan["running"]:
            stream = ledger.streams[name]
            most = min(ledger.open["frames_per_chunk"], stream.frames - stream.committed)
            right = start == stream.committed and count == most
            ledger.expect("frames", right, f"{name!r} is to make {count} frames from {start}")
            ledger.expect("accounting", 0 < nbytes <= stream.worst, f"{nbytes} bytes are promised to {name!r}")
            worst = stream.backed or nbytes == stream.worst
            ledger.expect("accounting", worst, f"{name!r} is not promised its worst case")
            stream.nbytes = nbytes
            ledger.planned[name] = (start, count)
            ledger.held.append((stream.tenant, name, nbytes, stream.branches))
        most = ledger.open["config"]["max_running"]
        ledger.expect("slots", most is None or len(listed) <= most, f"{len(listed)} streams run, {most} may")

    def _check_leader(self, plan: dict[str, Any]) -> None:
        ledger, leader = self.ledger, plan["leader"]
        old = ledger.streams.get(ledger.leader)
        keeps = old is not None and old.state == "running" and old.chunks == ledger.leader_chunks
        ledger.expect("leader", bool(leader) == bool(ledger.planned), f"{len(ledger.planned)} run, {leader!r} leads")
        ledger.expect("leader", not leader or leader in ledger.planned, f"{leader!r} leads and does not run")
        ledger.expect(
            "leader", not keeps or leader == ledger.leader, f"{leader!r} replaced {ledger.leader!r} too early"
        )
        if not keeps and leader in ledger.streams:
            ledger.leader, ledger.leader_chunks = leader, ledger.streams[leader].chunks

    def _on_report(self, record: dict[str, Any]) -> None:
        ledger = self.ledger
        for name, frames in record["committed"].items():
            stream = ledger.streams[name]
            ledger.expect("frames", frames <= ledger.planned[name][1], f"{name!r} made {frames} frames")
            if stream.state != "running":
                continue
            stream.committed += frames
            if frames:
                stream.chunks, stream.stalls = stream.chunks + 1, 0
            if stream.committed == stream.frames and name not in record["failed"]:
                ledger.end(name, "finished", "completed")
        for name in record["failed"]:
            if ledger.streams[name].state in ("running", "parked"):
                ledger.end(name, "failed", "failed")


def check_log(lines: Iterable[str]) -> list[Violation]:
    """All violations in a log."""
    checker = Checker()
    for line in lines:
        checker.feed(line)
    return checker.finish()
