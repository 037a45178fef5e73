"""Does what `stress.faults.FAULTS` names to a run of the simulator, as often as its scenario says."""

from typing import TYPE_CHECKING

from qvg_paged.errors import ArgumentError, StateError
from qvg_paged.scheduler import Decision, Outcome, Plan, StreamState, TenantSpec
from stress.faults import BREAKING, RESUMING

if TYPE_CHECKING:
    from stress.simulator import Simulator

__all__ = ["Injector"]

CROWD = 40
"""Streams beyond which no flood adds more."""
WANTED = {
    "cancel queued": (StreamState.QUEUED,),
    "cancel running": (StreamState.RUNNING,),
    "cancel parked": (StreamState.PARKED,),
}


class Injector:
    """Faults of one run.

    Args:
        run: the simulator.

    Attributes:
        active: whether faults still happen.
        broken: fault of each stream that the latest plan's engine fails.
    """

    def __init__(self, run: "Simulator") -> None:
        self._run, self._rng, self._scheduler = run, run.rng, run.scheduler
        self._rates = run.scenario.faults
        self._old: tuple[Plan, str] | None = None
        self.active = True
        self.broken: dict[str, str] = {}

    def stop(self) -> None:
        """Faults stop; memory and quotas are as in the beginning."""
        self.active = False
        self._scheduler.limit_pool(None)
        self._run.set_tenants()

    def _draw(self, fault: str) -> bool:
        rate = self._rates.get(fault)
        return rate is not None and self.active and self._rng.random() < rate

    def _hit(self, fault: str, stream_id: str = "", phase: str = "") -> None:
        if stream_id and not phase:
            state = self._scheduler.state(stream_id)
            phase = "final" if state.is_final else state.value
        self._run.result.fired[fault, phase] += 1
        self._run.result.events += 1
        self._run.note("fault", ("fault", fault), ("id", stream_id))

    def break_chunks(self, plan: Plan, committed: dict[str, int]) -> dict[str, str]:
        """Chunks that come to nothing, in `committed`, and streams that break, as the answer."""
        failed: dict[str, str] = {}
        self.broken = {}
        if not self.active:
            return failed
        names = sorted(committed)
        if names and self._draw("out of memory"):
            for name in names[self._rng.randrange(len(names)) :]:
                self._hit("out of memory", name)
                self._break(name, "out of memory", committed)
        for fault, breaks in BREAKING.items():
            if names and self._draw(fault):
                name = self._rng.choice(names)
                self._hit(fault, name)
                self._break(name, fault, committed)
                if breaks:
                    failed[name] = f"{fault}\n"
        for fault in RESUMING:
            if plan.resumed and self._draw(fault):
                name = self._rng.choice(plan.resumed).stream_id
                self._hit(fault, name, "resuming")
                self._break(name, fault, committed)
                failed[name] = fault
        for fault in ("park fails", "disk full"):
            if plan.parked and self._draw(fault):
                name = self._rng.choice(plan.parked).stream_id
                self._hit(fault, name, "parking")
                self.broken[name] = fault
                failed[name] = fault
        return failed

    def _break(self, name: str, fault: str, committed: dict[str, int]) -> None:
        committed[name] = 0
        self.broken[name] = fault

    def inject(self, plan: Plan | None) -> None:
        """Faults that come from outside, between two plans (None) or while one is carried out."""
        if not self.active:
            return
        self._cancel_some(plan)
        self._change_some()
        if self._draw("duplicate id"):
            self._expect_refusal()
        if self._draw("too large"):
            self._hit("too large")
            self._run.submit("t0", self._run.scenario.frames[1], branches=10_000)
        crowded = len(self._run.requests) > CROWD
        if not crowded and self._draw("flood"):
            self._hit("flood")
            for _ in range(30):
                self._run.submit("flooder", self._run.scenario.frames[0])
        if not crowded and self._draw("fill and squeeze"):
            self._hit("fill and squeeze")
            for _ in range(3):
                self._run.submit("squeezer", self._run.scenario.frames[1], branches=1)
        if plan is None:
            self._turn_the_clock()

    def _expect_refusal(self) -> None:
        alive = next(iter(self._run.open), None)
        if alive is None or self._scheduler.state(alive).is_final:
            return
        self._hit("duplicate id", alive)
        try:
            self._scheduler.submit(self._run.requests[alive])
        except ArgumentError:
            return
        raise AssertionError(f"{alive} was accepted twice")

    def _cancel_some(self, plan: Plan | None) -> None:
        for fault, wanted in WANTED.items():
            if self._draw(fault):
                names = [name for name in self._run.requests if self._scheduler.state(name) in wanted]
                self._cancel_one(fault, names)
        if self._draw("cancel final"):
            ended = [name for name in self._run.requests if self._scheduler.state(name).is_final]
            self._cancel_one("cancel final", [*ended, *self._run.gone])
        moving: dict[str, tuple[Decision, ...]] = {}
        if plan is not None:
            moving = {"parking": plan.parked, "resuming": plan.resumed, "admitted": plan.admitted}
        for phase, decisions in moving.items():
            if decisions and self._draw(f"cancel {phase}"):
                self._cancel_one(f"cancel {phase}", [decision.stream_id for decision in decisions], phase)
        if self._draw("cancel unknown"):
            self._hit("cancel unknown")
            try:
                self._scheduler.cancel("nobody")
            except ArgumentError:
                return
            raise AssertionError("a stream that never was could be cancelled")

    def _cancel_one(self, fault: str, names: list[str], phase: str = "") -> None:
        if names:
            name = self._rng.choice(names)
            self._hit(fault, name, phase)
            self._scheduler.cancel(name)
            if self._draw("double free"):
                self._hit("double free", name)
                self._scheduler.cancel(name)

    def misreport(self, plan: Plan) -> None:
        """The engine reports a plan a second time, or one of long ago."""
        for fault, reported in (("double free", plan), ("stale handle", self._old[0] if self._old else None)):
            if reported is not None and reported.running and self._draw(fault):
                self._hit(fault, "")
                try:
                    self._scheduler.update(reported, Outcome())
                except StateError:
                    continue
                raise AssertionError(f"{fault}: plan {reported.step} could be reported again")
        self._old = (plan, "")

    def _change_some(self) -> None:
        pool = self._run.cache.pool_nbytes
        if self._draw("pool shrinks"):
            self._hit("pool shrinks")
            self._scheduler.limit_pool(self._rng.choice([None, pool // 2, int(pool * 0.8), pool]))
        for fault in ("quota changes", "weight changes"):
            if self._draw(fault):
                self._hit(fault)
                index = self._rng.randrange(self._run.scenario.tenants)
                weight = self._rng.choice([0.5, 1.0, 3.0]) if fault == "weight changes" else 1.0
                ceiling = self._rng.choice([None, pool // 3, pool]) if fault == "quota changes" else None
                self._scheduler.set_tenant(f"t{index}", TenantSpec(weight=weight, ceiling_nbytes=ceiling))

    def _turn_the_clock(self) -> None:
        run = self._run
        if self._draw("clock forward"):
            self._hit("clock forward")
            run.skew += 3600.0
        if self._draw("clock stalls"):
            self._hit("clock stalls")
            run.skew -= min(run.skew, 0.5)
        if run.result.steps and self._draw("clock backward"):
            self._hit("clock backward")
            try:
                self._scheduler.step(-1.0)
            except (ArgumentError, StateError):
                return
            raise AssertionError("time ran backwards and nobody noticed")
