"""What comes of a run, and what it is made of: names of phases in which a fault can hit a stream."""

from collections import Counter
from dataclasses import dataclass, field

from stress.scenario import Scenario

__all__ = ["PHASES", "Run"]

PHASES = ("queued", "admitted", "running", "parking", "parked", "resuming", "final", "")
"""Where a stream is when a fault hits it; "" for faults that hit no stream in particular."""


@dataclass
class Run:
    """What came of a run.

    Attributes:
        scenario, seed: what was run.
        lines: the event log.
        digest: its hash.
        steps: plans made.
        events: things that happened: inputs, faults, and what each plan decided for each stream.
        fired: how often each fault happened, by phase of the stream that it hit.
        decision_seconds: real time that each step took.
        seconds: virtual time of the run.
        drained: whether every stream came to an end.
    """

    scenario: Scenario
    seed: int
    lines: list[str] = field(default_factory=list)
    digest: str = ""
    steps: int = 0
    events: int = 0
    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    decision_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    drained: bool = False
