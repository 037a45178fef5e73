"""All that is known of one stream, as a value: it is replaced, never changed."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from qvg_paged.ladder import Squeeze
from qvg_paged.scheduler.decision import Decision
from qvg_paged.scheduler.request import StreamRequest, StreamState
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView, drafted
from qvg_paged.timeline import Demand

__all__ = ["ARRIVAL", "Entry", "total"]

ARRIVAL = attrgetter("arrival")
NEW, SET = object.__new__, object.__setattr__


@dataclass(frozen=True)
class Entry:
    """All that is known of a stream.

    Attributes:
        request: what was asked for; `shown` is the copy that policies get.
        priority, deadline_fps: its own and its tenant's, put together.
        worst, worst_nbytes: pool objects at its worst, all branches, and their bytes.
        need, need_nbytes: what is reserved when it runs next.
        arrival: serial number of its submission.
        decision: the latest decision about it alone, but what it does next while it runs; `State.decision` has that and
            what it was told with others.
        state: where it is.
        committed: frames committed.
        chunks: chunks finished; `chunks_before` is their number when it last began to run.
        since: time since when it has waited or run.
        first_chunk: time at which its first chunk was reported.
        parks: how often it was parked; `stalls` counts those since its latest finished chunk.
        backed: whether host memory is set aside for it, without which it is never parked.
        overtaken: how many streams went before it although it was first in line.
        progressed: step at which it last finished a chunk or began to run.
        squeeze: how far it was squeezed, or None.
        key: its place in its tenant's line, before arrival.
        id, tenant: its name and who pays, as in the request, but found at once.
    """

    request: StreamRequest
    shown: StreamRequest
    worst: Demand
    worst_nbytes: int
    need: Demand
    need_nbytes: int
    arrival: int
    decision: Decision
    priority: int = 0
    deadline_fps: float | None = None
    state: StreamState = StreamState.QUEUED
    committed: int = 0
    chunks: int = 0
    chunks_before: int = 0
    since: float | None = None
    first_chunk: float | None = None
    parks: int = 0
    stalls: int = 0
    backed: bool = False
    overtaken: int = 0
    progressed: int = 0
    squeeze: Squeeze | None = None
    key: float = 0.0
    id: str = field(init=False, repr=False, compare=False)
    tenant: str = field(init=False, repr=False, compare=False)
    _view: StreamView | None = field(default=None, init=False, repr=False, compare=False)

    def __init__(
        self,
        request: StreamRequest,
        shown: StreamRequest,
        worst: Demand,
        worst_nbytes: int,
        arrival: int,
        decision: Decision,
    ) -> None:
        """A stream that was submitted; what is not given here is as above, until `but` changes it."""
        self.__dict__.update(
            request=request,
            shown=shown,
            worst=worst,
            worst_nbytes=worst_nbytes,
            need=worst,
            need_nbytes=worst_nbytes,
            arrival=arrival,
            decision=decision,
            id=request.id,
            tenant=request.tenant,
        )

    @property
    def view(self) -> StreamView:
        """What policies see of it, made once (`cached_property` takes a lock)."""
        found = self._view
        if found is not None:
            return found
        self.__dict__["_view"] = view = drafted(
            self.shown,
            self.state,
            self.arrival,
            self.need_nbytes,
            self.worst_nbytes,
            self.committed,
            self.since,
            self.first_chunk,
            self.parks,
            self.priority,
            self.deadline_fps,
            self.id,
            self.tenant,
        )
        return view

    def but(self, **changes: Any) -> "Entry":
        """A copy with some fields changed: `dataclasses.replace` at a fraction of its price."""
        return self.changed(changes)

    def changed(self, changes: dict[str, Any]) -> "Entry":
        """The same, with the changes in a dictionary."""
        fields = self.__dict__ | changes
        fields["_view"] = None
        other: Entry = NEW(Entry)
        SET(other, "__dict__", fields)
        return other

    def standing(self, tenant: Tenant) -> dict[str, Any]:
        """The fields that depend on its tenant, too."""
        request, spec = self.request, tenant.spec
        return {
            "priority": request.priority + spec.priority,
            "deadline_fps": request.deadline_fps or spec.deadline_fps,
        }


def total(entries: Iterable[Entry]) -> Demand:
    """What is reserved for them together."""
    dense = quantised = codebooks = demoted = 0
    for entry in entries:
        need = entry.need
        dense += need.dense_pages
        quantised += need.quantised_pages
        codebooks += need.codebooks
        demoted += need.demoted_pages
    return Demand(dense, quantised, codebooks, demoted)
