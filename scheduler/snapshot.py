"""Snapshots for policies, made from the state; what nobody looks at is not made, and of a stream only once."""

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from types import MappingProxyType
from typing import Any, Generic, TypeVar, overload

from qvg_paged.scheduler.state import ARRIVAL, Entry, Rules, State
from qvg_paged.scheduler.tenant import Tenant
from qvg_paged.scheduler.view import StreamView, SystemView, TenantView

__all__ = ["may_be_parked", "system_view"]

VIEW = attrgetter("view")
Value = TypeVar("Value")


def may_be_parked(rules: Rules, state: State, entry: Entry, *, forced: bool) -> bool:
    """Whether a running stream may be given up: never the leader, never too often, by choice only after a chunk."""
    if rules.parking is None or not entry.backed or entry.id == state.leader or entry.id not in state.running:
        return False
    if entry.stalls >= rules.config.max_parks:
        return False
    return forced or entry.chunks - entry.chunks_before >= rules.config.min_chunks


class _Views(Sequence[StreamView]):
    """Views of waiting streams by arrival."""

    def __init__(self, state: State) -> None:
        self._queued, self._parked = tuple(state.queued.values()), tuple(state.parked.values())

    @cached_property
    def _entries(self) -> tuple[Entry, ...]:
        return tuple(sorted(self._queued + self._parked, key=ARRIVAL)) if self._parked else self._queued

    def __len__(self) -> int:
        return len(self._queued) + len(self._parked)

    def __iter__(self) -> Iterator[StreamView]:
        return map(VIEW, self._entries)

    def __reversed__(self) -> Iterator[StreamView]:
        return map(VIEW, reversed(self._entries))

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


class _Late(Mapping[str, Value], Generic[Value]):
    """A mapping that is made when somebody looks into it."""

    _made: Mapping[str, Value] | None = None

    def _make(self) -> Mapping[str, Value]:
        raise NotImplementedError

    def _all(self) -> Mapping[str, Value]:
        if self._made is None:
            self._made = MappingProxyType(self._make())
        return self._made

    def __getitem__(self, name: str) -> Value:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, Value]:
        """As of every mapping, without a detour."""
        return self._all().items()

    def __repr__(self) -> str:
        return repr(dict(self))


class _Lines(_Late[tuple[str, ...]]):
    """Ids of waiting streams by tenant."""

    def __init__(self, waiting: _Views) -> None:
        self._waiting = waiting

    def _make(self) -> dict[str, tuple[str, ...]]:
        lines: dict[str, list[str]] = {}
        for stream in self._waiting:
            lines.setdefault(stream.tenant, []).append(stream.id)
        return {name: tuple(line) for name, line in lines.items()}


class _Tenants(_Late[TenantView]):
    """Tenants; `held` is promised bytes of each."""

    def __init__(self, tenants: Mapping[str, Tenant], held: Mapping[str, int]) -> None:
        self._tenants, self._held = dict(tenants), dict(held)

    def _make(self) -> dict[str, TenantView]:
        return {
            name: TenantView(
                weight=tenant.spec.weight,
                service=tenant.service,
                virtual_time=tenant.virtual_time,
                nbytes=self._held.get(name, 0),
                floor_nbytes=tenant.spec.floor_nbytes,
            )
            for name, tenant in self._tenants.items()
        }


def system_view(
    rules: Rules, state: State, now: float, seed: int, held: Mapping[str, int], *, forced: bool
) -> SystemView:
    """What a policy sees; `held` is promised bytes by tenant."""
    running = state.by_arrival()
    pool = rules.cache.pool_nbytes
    waiting = _Views(state)
    return SystemView(
        now=now,
        seed=seed,
        pool_nbytes=pool if state.limit is None else state.limit,
        waiting=waiting,
        running=tuple(map(VIEW, running)),
        lines=_Lines(waiting),
        parkable=frozenset(entry.id for entry in running if may_be_parked(rules, state, entry, forced=forced)),
        tenants=_Tenants(state.tenants, held),
        dearest_chunk=state.dearest_chunk,
    )
