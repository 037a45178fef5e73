"""Verifies a run from its event log alone: it imports nothing of the scheduler and trusts none of its words.

Bytes, states, leaders, service and waits are followed line by line; what the plans say is held against that. A
violation names the invariant and the line.
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Checker", "Violation", "check_log"]

FINAL = ("finished", "failed", "cancelled", "refused")
SCARCE = ("no memory", "no slot", "floor", "no host memory")
CLAIM_PLANS = 8
FOLLOWED_TENANTS = 8
GIB = 1 << 30


@dataclass(frozen=True)
class Violation:
    """Something that must not happen.

    Attributes:
        invariant: its name.
        seq: line of the log.
        text: what happened.
    """

    invariant: str
    seq: int
    text: str


@dataclass
class _Stream:
    tenant: str
    frames: int
    branches: int
    worst: int
    state: str = "queued"
    reason: str = "queued"
    committed: int = 0
    chunks: int = 0
    chunks_before: int = 0
    stalls: int = 0
    ending: str = ""
    nbytes: int = 0
    spent: float = 0.0


@dataclass
class _Tenant:
    ceiling: int | None = None
    floor: int = 0
    weight: float = 1.0
    service: float = 0.0
    claiming: int = 0


@dataclass
class Checker:
    """Follows a log.

    Attributes:
        violations: what was found.
    """

    violations: list[Violation] = field(default_factory=list)
    _streams: dict[str, _Stream] = field(default_factory=dict)
    _tenants: dict[str, _Tenant] = field(default_factory=lambda: defaultdict(_Tenant))
    _seq: int = -1
    _now: float = float("-inf")
    _leader: str = ""
    _leader_chunks: int = 0
    _limit: int | None = None
    _open: dict[str, Any] = field(default_factory=dict)
    _planned: dict[str, tuple[int, int]] = field(default_factory=dict)
    _parked_now: list[str] = field(default_factory=list)
    _held: list[tuple[str, str, int, int]] = field(default_factory=list)
    _faults: int = 0
    _draining: bool = False
    _calm: bool = True
    _dearest: float = 0.0
    _slots: int = 0
    _gaps: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def feed(self, line: str) -> None:
        """The next line."""
        record = json.loads(line)
        self._seq += 1
        self._expect("log", record["v"] == 1 and record["seq"] == self._seq, f"line {self._seq} is {record['seq']}")
        handler = getattr(self, f"_on_{record['kind']}", None)
        self._expect("log", handler is not None, f"unknown kind {record['kind']!r}")
        if handler is not None:
            handler(record)

    def finish(self) -> list[Violation]:
        """The end of the log: nothing may be left. All violations."""
        left = {name: s.state for name, s in self._streams.items() if s.state not in FINAL}
        self._expect("drained", not left, f"still there: {left}")
        untold = [name for name, s in self._streams.items() if s.ending]
        self._expect("drained", not untold, f"ended, but no plan told the engine: {untold}")
        self._check_fairness()
        return self.violations

    def _expect(self, invariant: str, holds: bool, text: str) -> None:
        if not holds:
            self.violations.append(Violation(invariant, self._seq, text))

    @property
    def _parks(self) -> bool:
        return self._open.get("reservation") == "next chunk"

    def _in(self, *states: str) -> dict[str, _Stream]:
        return {name: s for name, s in self._streams.items() if s.state in states}

    def _on_open(self, record: dict[str, Any]) -> None:
        self._open = record

    def _on_policy(self, record: dict[str, Any]) -> None:
        strikes = self._open["config"]["policy_strikes"]
        self._expect("policy", self._faults < strikes, f"asked again after {self._faults} faults")
        self._expect("policy", (record["answer"] is None) == bool(record["fault"]), "a wrong answer was used")
        self._faults += bool(record["fault"])

    def _on_submit(self, record: dict[str, Any]) -> None:
        name, reason = record["id"], record["reason"]
        old = self._streams.get(name)
        self._expect("names", old is None or old.state in FINAL, f"{name!r} was in use")
        stream = _Stream(record["tenant"], record["frames"], record["branches"], record["nbytes"])
        self._streams[name] = stream
        if reason == "queued":
            self._expect("drain", not self._draining, f"{name!r} was accepted while draining")
            fits = stream.worst <= self._open["pool_nbytes"]
            self._expect("admission", fits, f"{name!r} can never fit and was accepted")
        else:
            stream.state, stream.ending = "refused", reason
            known = reason in ("too large", "queue full", "draining")
            self._expect("reasons", known, f"{name!r} was refused as {reason!r}")

    def _on_cancel(self, record: dict[str, Any]) -> None:
        stream = self._streams[record["id"]]
        if stream.state in FINAL:
            self._expect("transitions", record["reason"] != "queued", f"{record['id']!r} rose from the dead")
            return
        self._expect("transitions", record["reason"] == "cancelled", f"{record['id']!r} was not cancelled")
        stream.ending = "" if stream.state == "queued" else "cancelled"
        stream.state = "cancelled"

    def _on_tenant(self, record: dict[str, Any]) -> None:
        tenant = self._tenants[record["tenant"]]
        if tenant.weight != record["weight"]:
            self._gaps = {}
            self._calm = self._calm and not self._planned and tenant.service == 0
        tenant.weight = record["weight"]
        tenant.ceiling, tenant.floor = record["ceiling_nbytes"], record["floor_nbytes"]
        floors = sum(t.floor for t in self._tenants.values())
        self._expect("quota", floors <= self._open["pool_nbytes"], "the floors exceed the pool")
        self._calm = self._calm and tenant.ceiling is None and not tenant.floor

    def _on_limit(self, record: dict[str, Any]) -> None:
        self._limit = record["nbytes"]
        self._calm = self._calm and self._limit is None

    def _on_drain(self, record: dict[str, Any]) -> None:
        self._draining = bool(record)

    def _on_shutdown(self, record: dict[str, Any]) -> None:
        self._draining = bool(record)
        for name, stream in self._in("queued", "running", "parked").items():
            self._on_cancel({"id": name, "reason": "cancelled"})
            stream.state = "cancelled"

    def _on_engine(self, record: dict[str, Any]) -> None:
        if record["event"] == "memory":
            self._expect("memory", record["fits"], "the engine ran out of memory")
            resident = len(self._in("running"))
            self._expect("engine", record["open"] == resident, f"{record['open']} are open, {resident} run")

    def _on_plan(self, plan: dict[str, Any]) -> None:
        self._expect("clock", plan["now"] >= self._now, "time ran backwards")
        seconds = min(plan["now"] - self._now, self._open["config"]["longest_charge"]) if self._held else 0.0
        self._now = plan["now"]
        self._charge(seconds)
        self._announce(plan)
        self._move(plan)
        self._check_running(plan)
        self._check_leader(plan)
        self._check_memory()
        self._check_line(plan)
        self._follow_service()

    def _announce(self, plan: dict[str, Any]) -> None:
        """Ends are told once, each to whom it concerns, with the right reason."""
        told = [(name, reason, False) for name, reason in plan["finished"]]
        told += [(name, reason, True) for name, reason in plan["rejected"]]
        for name, reason, refused in told:
            stream = self._streams[name]
            right = stream.ending == reason and (stream.state == "refused") == refused
            self._expect("transitions", right, f"{name!r} ended as {reason!r}, expected {stream.ending!r}")
            stream.ending = ""
        untold = [name for name, s in self._streams.items() if s.ending and s.state != "refused"]
        self._expect("transitions", not untold, f"ended, but the plan does not say so: {untold}")

    def _move(self, plan: dict[str, Any]) -> None:
        config = self._open["config"]
        self._parked_now = [name for name, _ in plan["parked"]]
        for name, reason in plan["parked"]:
            stream = self._streams[name]
            self._expect("transitions", stream.state == "running", f"{name!r} was parked, it was {stream.state}")
            stuck = name == self._leader and stream.chunks == self._leader_chunks
            self._expect("leader", not stuck, f"the leader {name!r} was parked before it finished a chunk")
            self._expect("parking", self._parks, f"{name!r} was parked, though nobody may be")
            if reason == "parked":
                done = stream.chunks - stream.chunks_before
                self._expect("residency", done >= config["min_chunks"], f"{name!r} was parked after {done} chunks")
            stream.stalls += 1
            self._expect("parks", stream.stalls <= config["max_parks"], f"{name!r} was parked {stream.stalls} times")
            stream.state, stream.reason, stream.nbytes = "parked", reason, 0
        for key, before in (("resumed", "parked"), ("admitted", "queued")):
            for name in plan[key]:
                stream = self._streams[name]
                right = stream.state == before and name not in self._parked_now
                self._expect("transitions", right, f"{name!r} was {key}, it was {stream.state}")
                self._expect("cancel", stream.state not in FINAL, f"{name!r} ran after its end")
                stream.state, stream.reason, stream.chunks_before = "running", "advance", stream.chunks

    def _check_running(self, plan: dict[str, Any]) -> None:
        listed = [row[0] for row in plan["running"]]
        running = self._in("running")
        right = len(listed) == len(set(listed)) and set(listed) == set(running)
        self._expect("transitions", right, f"the plan runs {sorted(listed)}, expected {sorted(running)}")
        self._planned, self._held = {}, []
        for name, start, count, nbytes in plan["running"]:
            stream = self._streams[name]
            most = min(self._open["frames_per_chunk"], stream.frames - stream.committed)
            right = start == stream.committed and count == most
            self._expect("frames", right, f"{name!r} is to make {count} frames from {start}")
            self._expect("accounting", 0 < nbytes <= stream.worst, f"{nbytes} bytes are promised to {name!r}")
            if not self._parks:
                self._expect("accounting", nbytes == stream.worst, f"{name!r} is not promised its worst case")
            stream.nbytes = nbytes
            self._planned[name] = (start, count)
            self._held.append((stream.tenant, name, nbytes, stream.branches))
        most = self._open["config"]["max_running"]
        self._expect("slots", most is None or len(listed) <= most, f"{len(listed)} streams run, {most} may")

    def _check_leader(self, plan: dict[str, Any]) -> None:
        old = self._streams.get(self._leader)
        keeps = old is not None and old.state == "running" and old.chunks == self._leader_chunks
        leader = plan["leader"]
        self._expect("leader", bool(leader) == bool(self._planned), f"{len(self._planned)} run, {leader!r} leads")
        self._expect("leader", not leader or leader in self._planned, f"{leader!r} leads and does not run")
        self._expect("leader", not keeps or leader == self._leader, f"{leader!r} replaced {self._leader!r} too early")
        if not keeps and leader in self._streams:
            self._leader, self._leader_chunks = leader, self._streams[leader].chunks

    def _pinned(self, name: str) -> bool:
        """Whether it may have been impossible to park a running stream."""
        stream = self._streams[name]
        stuck = name == self._leader and stream.chunks == self._leader_chunks and stream.chunks != stream.chunks_before
        return stuck or stream.stalls >= self._open["config"]["max_parks"] or not self._roomy()

    def _roomy(self) -> bool:
        """Whether the host has room for all streams at their worst, so that everyone can be parked."""
        alive = self._in("running", "parked", "queued")
        return self._parks and sum(s.worst for s in alive.values()) <= self._open["host_nbytes"]

    def _tenant_bytes(self) -> dict[str, int]:
        held: dict[str, int] = defaultdict(int)
        for tenant, _, nbytes, _ in self._held:
            held[tenant] += nbytes
        return held

    def _check_memory(self) -> None:
        promised = sum(nbytes for _, _, nbytes, _ in self._held)
        pool = self._open["pool_nbytes"]
        self._expect("accounting", promised <= pool, f"{promised} of {pool} bytes are promised")
        fresh = [name for name in self._planned if self._streams[name].chunks == self._streams[name].chunks_before]
        if self._limit is not None and promised > self._limit:
            free = [name for name in self._planned if name != self._leader and not self._pinned(name)]
            self._expect("limit", not free, f"{promised} of {self._limit} bytes are promised, {free} could go")
        for tenant, nbytes in self._tenant_bytes().items():
            ceiling = self._tenants[tenant].ceiling
            if ceiling is not None and nbytes > ceiling:
                mine = [name for name in self._planned if self._streams[name].tenant == tenant]
                free = [name for name in mine if name != self._leader and not self._pinned(name)]
                new = [name for name in mine if name in fresh and self._streams[name].stalls == 0]
                self._expect("quota", not free, f"{tenant!r} holds {nbytes} of {ceiling} bytes, {free} could go")
                grown = self._parks or not [n for n in new if n in self._started]
                self._expect("quota", grown, f"{new} were admitted above the ceiling of {tenant!r}")

    @property
    def _started(self) -> set[str]:
        return {name for name, (start, _) in self._planned.items() if start == 0 and name not in self._seen_running}

    _seen_running: set[str] = field(default_factory=set)

    def _check_line(self, plan: dict[str, Any]) -> None:
        """Reasons are true, and nobody waits while there is room."""
        line = self._in("queued", "parked")
        for name, reason in plan["waiting"]:
            self._expect("transitions", name in line, f"{name!r} is told to wait as {reason!r} and is not in line")
            self._streams[name].reason = reason
        reasons = defaultdict(list)
        for name, stream in line.items():
            reasons[stream.reason].append(name)
        config, held = self._open["config"], self._tenant_bytes()
        promised, pool = sum(held.values()), self._open["pool_nbytes"]
        room = (pool if self._limit is None else self._limit) * (1 - config["headroom"])
        for name in reasons["no memory"]:
            fits = promised + self._streams[name].worst <= 0.8 * room
            self._expect("work conservation", not fits, f"{name!r} waits for memory, of which there is enough")
        for name in reasons["no slot"]:
            full = len(self._planned) >= (config["max_running"] or 0) > 0
            self._expect("work conservation", full, f"{name!r} waits for a slot, of which there are enough")
        for name in reasons["quota"]:
            ceiling = self._tenants[self._streams[name].tenant].ceiling
            self._expect("reasons", ceiling is not None, f"{name!r} waits for a quota that its tenant does not have")
        if reasons["behind"]:
            blocked = any(reasons[reason] for reason in SCARCE)
            self._expect("work conservation", blocked, f"{reasons['behind']} wait behind nobody")
        if reasons["hold off"]:
            declared = (plan["hold"] and bool(self._in("parked"))) or bool(plan["resumed"])
            self._expect("work conservation", declared, f"{reasons['hold off']} wait without need")
        self._expect("reasons", not reasons["queued"], f"not told why: {reasons['queued']}")
        idle = not self._planned and line and self._limit is None
        barred = all(self._tenants[s.tenant].ceiling is not None for s in line.values())
        self._expect("work conservation", not idle or barred, f"nothing runs, {len(line)} streams wait")
        self._check_claims(line, held)
        self._seen_running |= set(self._planned)

    def _check_claims(self, line: dict[str, _Stream], held: dict[str, int]) -> None:
        """A tenant below its floor does not wait long for what the floor entitles it to."""
        if self._limit is not None or not self._roomy():
            return
        for name, tenant in self._tenants.items():
            due = [s for s in line.values() if s.tenant == name and held[name] + s.worst <= tenant.floor]
            others = [n for n in self._planned if self._streams[n].tenant != name and not self._pinned(n)]
            capped = self._open["config"]["min_chunks"] > 1
            tenant.claiming = tenant.claiming + 1 if due and others and not capped else 0
            self._expect("floor", tenant.claiming <= CLAIM_PLANS, f"{name!r} has been below its floor for too long")

    def _on_report(self, record: dict[str, Any]) -> None:
        for name, frames in record["committed"].items():
            stream = self._streams[name]
            self._expect("frames", frames <= self._planned[name][1], f"{name!r} made {frames} frames")
            if stream.state != "running":
                continue
            stream.committed += frames
            if frames:
                stream.chunks, stream.stalls = stream.chunks + 1, 0
            if name in record["failed"]:
                continue
            if stream.committed == stream.frames:
                stream.state, stream.ending = "finished", "completed"
        for name in record["failed"]:
            stream = self._streams[name]
            if stream.state in ("running", "parked"):
                stream.state, stream.ending = "failed", "failed"

    def _charge(self, seconds: float) -> None:
        """What the plan before cost its tenants, by the log's own figures."""
        config = self._open["config"]
        for tenant, name, nbytes, branches in self._held:
            cost = config["chunk_cost"] * branches + config["gib_second_cost"] * seconds * nbytes / GIB
            stream, owner = self._streams[name], self._tenants[tenant]
            stream.spent += cost
            owner.service += cost
            unit = cost if self._parks else stream.spent
            self._dearest = max(self._dearest, unit)
        self._slots = max(self._slots, len(self._held))

    def _follow_service(self) -> None:
        """The gap of weighted service between tenants while both are in line without a break."""
        backlogged = {s.tenant for s in self._in("queued", "parked").values()}
        names = sorted(name for name in self._tenants if name in backlogged)[:FOLLOWED_TENANTS]
        gaps: dict[tuple[str, str], tuple[float, float]] = {}
        for i, one in enumerate(names):
            for two in names[i + 1 :]:
                a, b = self._tenants[one], self._tenants[two]
                gap = a.service / a.weight - b.service / b.weight
                least, most = self._gaps.get((one, two), (gap, gap))
                gaps[one, two] = (min(least, gap), max(most, gap))
                self.largest_gap = max(self.largest_gap, gaps[one, two][1] - gaps[one, two][0])
        self._gaps = gaps

    largest_gap: float = 0.0

    @property
    def gap_unit(self) -> float:
        """U: the dearest unit that is not interrupted, by weight, times the streams that run together.

        A unit is a chunk where streams can be parked, and a policy may let tenants get ahead by some chunks before it
        parks; elsewhere it is a whole stream.
        """
        least = min((tenant.weight for tenant in self._tenants.values()), default=1.0)
        ahead = self._open["policy_settings"].get("quantum", 0.0) if self._parks else 0.0
        return self._dearest / least * (self._slots + ahead)

    def services(self) -> dict[str, tuple[float, float]]:
        """Cost units and weight of each tenant."""
        return {name: (tenant.service, tenant.weight) for name, tenant in self._tenants.items()}

    def _check_fairness(self) -> None:
        if self._open.get("policy") != "FairShare" or not self._calm or self._open["config"]["overtakes"]:
            return
        bound = 2 * self.gap_unit
        self._expect("fairness", self.largest_gap <= bound, f"service differs by {self.largest_gap}, bound {bound}")


def check_log(lines: Iterable[str]) -> list[Violation]:
    """All violations in a log."""
    checker = Checker()
    for line in lines:
        checker.feed(line)
    return checker.finish()
