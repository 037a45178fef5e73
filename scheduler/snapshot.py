"""Snapshots for policies, made from the state; what nobody looks at is not made, and of a stream only once."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from operator import attrgetter
from typing import Any, overload

from qvg_paged.scheduler.entry import ARRIVAL, Entry
from qvg_paged.scheduler.rules import Rules
from qvg_paged.scheduler.state import State
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView, SystemView, TenantView

__all__ = ["Moment", "parkable"]

VIEW = attrgetter("view")


def parkable(rules: Rules, state: State, *, forced: bool) -> frozenset[str]:
    """Running streams that may be given up: never the leader, never too often, by choice only after a chunk."""
    if rules.parking is None:
        return frozenset()
    leader, most, least = state.leader, rules.config.max_parks, rules.config.min_chunks
    return frozenset(
        [
            name
            for name, entry in state.running.items()
            if entry.backed and name != leader and entry.stalls < most
            if forced or entry.chunks - entry.chunks_before >= least
        ]
    )


class _Views(Sequence[StreamView]):
    """Views of waiting streams by arrival."""

    def __init__(self, state: State) -> None:
        self._queued, self._parked = state.queued.copy(), state.parked.copy()

    @property
    def ids(self) -> Set[str]:
        """Their names."""
        return self._queued.keys() | self._parked.keys() if self._parked else self._queued.keys()

    @cached_property
    def _entries(self) -> tuple[Entry, ...]:
        entries = tuple(self._queued.values())
        return tuple(sorted((*entries, *self._parked.values()), key=ARRIVAL)) if self._parked else entries

    def __len__(self) -> int:
        return len(self._queued) + len(self._parked)

    @cached_property
    def _all(self) -> tuple[StreamView, ...]:
        return tuple([entry._view or entry.view for entry in self._entries])

    def __iter__(self) -> Iterator[StreamView]:
        return iter(self._all)

    def __reversed__(self) -> Iterator[StreamView]:
        return reversed(self._all)

    @overload
    def __getitem__(self, place: int) -> StreamView: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[StreamView, ...]: ...

    def __getitem__(self, place: int | slice) -> StreamView | tuple[StreamView, ...]:
        found: Any = self._entries[place]
        return tuple(map(VIEW, found)) if isinstance(place, slice) else found.view

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class _Lines(Mapping[str, tuple[str, ...]]):
    """Ids of waiting streams by tenant, found when somebody asks."""

    def __init__(self, waiting: _Views) -> None:
        self._waiting = waiting

    @cached_property
    def _all(self) -> dict[str, tuple[str, ...]]:
        lines: dict[str, list[str]] = {}
        for stream in self._waiting:
            lines.setdefault(stream.tenant, []).append(stream.id)
        return {name: tuple(line) for name, line in lines.items()}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __repr__(self) -> str:
        return repr(self._all)


class _Tenants(Mapping[str, TenantView]):
    """Tenants; `held` is promised bytes of each."""

    def __init__(self, tenants: Mapping[str, Tenant], held: Mapping[str, int]) -> None:
        self._tenants, self._held = dict(tenants), dict(held)

    def __getitem__(self, name: str) -> TenantView:
        tenant, nbytes = self._tenants[name], self._held.get(name, 0)
        return TenantView(tenant.weight, tenant.service, tenant.virtual_time, nbytes, tenant.spec.floor_nbytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tenants)

    def __len__(self) -> int:
        return len(self._tenants)

    def __repr__(self) -> str:
        return repr(dict(self))


class Moment(SystemView):
    """What a policy sees; every part is made when somebody looks at it."""

    @classmethod
    def of(
        cls,
        rules: Rules,
        state: State,
        now: float,
        seed: int,
        held: tuple[Mapping[str, int], Mapping[str, int]],
        *,
        forced: bool,
        lasting: bool,
    ) -> "Moment":
        """The view of a step.

        Args:
            rules, state, now, seed: of the step.
            held: promised bytes, and running streams, by tenant.
            forced: whether somebody must make room, so that also those are parkable who have just come in.
            lasting: whether it stays as it is while the state changes. Policies of this package do without: they see
                tenants and running streams themselves, which have of their views what those policies ask for.
        """
        view = object.__new__(cls)
        view.__dict__.update(
            now=now,
            seed=seed,
            pool_nbytes=rules.cache.pool_nbytes if state.limit is None else state.limit,
            dearest_chunk=state.dearest_chunk,
            forced=forced,
            lasting=lasting,
            _rules=rules,
            _state=state,
            _held=held[0],
            running_by_tenant=dict(held[1]) if lasting else held[1],
        )
        if lasting:
            for name in _PARTS:
                getattr(view, name)
        return view

    @property
    def waiting_ids(self) -> Set[str]:
        """Ids of `waiting`."""
        ids: Set[str] = self.waiting.ids  # type: ignore[attr-defined]
        return ids

    def __getattr__(self, name: str) -> Any:
        made = self.__dict__[name] = _PARTS[name](self) if name in _PARTS else super().__getattribute__(name)
        return made


_PARTS: dict[str, Callable[[Any], Any]] = {
    "running": lambda view: tuple(map(VIEW, view._state.by_arrival()) if view.lasting else view._state.by_arrival()),
    "waiting": lambda view: _Views(view._state),
    "lines": lambda view: _Lines(view.waiting),
    "parkable": lambda view: parkable(view._rules, view._state, forced=view.forced),
    "tenants": lambda view: _Tenants(view._state.tenants, view._held) if view.lasting else view._state.tenants,
}
