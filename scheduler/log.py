"""The decision log: one JSON object per line, everything that went in and everything that was decided.

Lines are versioned, numbered and canonical (sorted keys, ASCII), so that a name cannot break one, and the SHA-256 over
them names the run: the same seed, inputs and answers of policies give the same digest. Record kinds: ``open`` (the
settings), ``submit``, ``cancel``, ``tenant``, ``limit``, ``drain``, ``shutdown`` and ``report`` (inputs),
``policy`` (a foreign policy's answer), ``plan`` (a decision).
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from qvg_paged.scheduler.decision import Decision
from qvg_paged.scheduler.inputs import Cancel, Drain, Input, LimitPool, SetTenant, Shutdown, Submit
from qvg_paged.scheduler.plan import Plan
from qvg_paged.scheduler.state import State

__all__ = ["VERSION", "DecisionLog", "describe_input", "describe_plan"]

VERSION = 1
ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


class DecisionLog:
    """Numbers lines, hashes them and hands them on.

    Args:
        sink: called with every line, without its end; None to keep the digest only.
    """

    def __init__(self, sink: Callable[[str], None] | None = None) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self.lines = 0

    def append(self, record: dict[str, Any]) -> None:
        """Write a record."""
        line = ENCODE({"v": VERSION, "seq": self.lines, **record})
        self.lines += 1
        self._hash.update(line.encode() + b"\n")
        if self._sink is not None:
            self._sink(line)

    @property
    def digest(self) -> str:
        """Hash of all lines so far."""
        return self._hash.hexdigest()


def describe_input(event: Input, decision: Decision | None) -> dict[str, Any]:
    """The record of something that went in, with the answer that was given at once."""
    record: dict[str, Any]
    match event:
        case Submit(request):
            record = {"kind": "submit", **asdict(request)}
        case Cancel(stream_id):
            record = {"kind": "cancel", "id": stream_id}
        case SetTenant(name, spec):
            record = {"kind": "tenant", "tenant": name, **asdict(spec)}
        case LimitPool(nbytes):
            record = {"kind": "limit", "nbytes": nbytes}
        case Drain():
            record = {"kind": "drain"}
        case Shutdown():
            record = {"kind": "shutdown"}
        case _:
            committed, failed = dict(event.outcome.committed), dict(event.outcome.failed)
            record = {"kind": "report", "step": event.plan.step, "committed": committed, "failed": failed}
    return record if decision is None else {**record, "reason": decision.reason.value}


def describe_plan(state: State, plan: Plan) -> dict[str, Any]:
    """The record of a plan; of the line it holds what has changed since the step before."""
    waiting = {name: (state.queued if name in state.queued else state.parked)[name] for name in state.news}
    return {
        "kind": "plan",
        "step": plan.step,
        "now": state.now,
        "leader": plan.leader,
        "finished": _reasons(plan.finished),
        "rejected": _reasons(plan.rejected),
        "demoted": [[d.stream_id, d.squeeze.rung.value, d.squeeze.since] for d in plan.demoted if d.squeeze],
        "shrunk": [[d.stream_id, d.squeeze.retrieval_frames] for d in plan.shrunk if d.squeeze],
        "parked": _reasons(plan.parked),
        "resumed": [decision.stream_id for decision in plan.resumed],
        "admitted": [decision.stream_id for decision in plan.admitted],
        "running": [_run(state, decision) for decision in plan.running],
        "waiting": _reasons([state.decision(entry) for entry in waiting.values()]),
        "hold": state.hold > 0,
        "fault": plan.policy_fault,
    }


def _reasons(decisions: Sequence[Decision]) -> list[list[str]]:
    return [[decision.stream_id, decision.reason.value] for decision in decisions]


def _run(state: State, decision: Decision) -> list[Any]:
    frames = decision.frames
    assert frames is not None
    return [decision.stream_id, frames.start, len(frames), state.running[decision.stream_id].need_nbytes]
