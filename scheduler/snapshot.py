"""Snapshots for policies, made from the state; those of streams that did not change are made once."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from qvg_paged.scheduler.state import Entry, Rules, State
from qvg_paged.scheduler.view import StreamView, SystemView, TenantView

__all__ = ["may_be_parked", "system_view"]


def may_be_parked(rules: Rules, state: State, entry: Entry, *, forced: bool) -> bool:
    """Whether a running stream may be given up: never the leader, never too often, by choice only after a chunk."""
    if rules.parking is None or not entry.backed or entry.id == state.leader or entry.id not in state.running:
        return False
    if entry.stalls >= rules.config.max_parks:
        return False
    return forced or entry.chunks - entry.chunks_before >= rules.config.min_chunks


def system_view(
    rules: Rules, state: State, now: float, seed: int, held: Mapping[str, int], *, forced: bool
) -> SystemView:
    """What a policy sees; `held` is promised bytes by tenant."""
    running = state.by_arrival()
    pool = rules.cache.pool_nbytes
    return SystemView(
        now=now,
        seed=seed,
        pool_nbytes=pool if state.limit is None else state.limit,
        waiting=_views(state, state.waiting()),
        running=_views(state, running),
        parkable=frozenset(entry.id for entry in running if may_be_parked(rules, state, entry, forced=forced)),
        tenants=MappingProxyType(
            {
                name: TenantView(
                    weight=tenant.spec.weight,
                    service=tenant.service,
                    virtual_time=tenant.virtual_time,
                    nbytes=held.get(name, 0),
                    floor_nbytes=tenant.spec.floor_nbytes,
                )
                for name, tenant in state.tenants.items()
            }
        ),
        dearest_chunk=state.dearest_chunk,
    )


def _views(state: State, entries: Iterable[Entry]) -> tuple[StreamView, ...]:
    return tuple(_view(state, entry) for entry in entries)


def _view(state: State, entry: Entry) -> StreamView:
    cached = state.views.get(entry.id)
    if cached is not None and cached[0] is entry:
        return cached[1]
    spec = state.tenants[entry.tenant].spec
    view = StreamView(
        request=entry.shown,
        state=entry.state,
        arrival=entry.arrival,
        nbytes=entry.need_nbytes,
        worst_nbytes=entry.worst_nbytes,
        committed=entry.committed,
        since=entry.since,
        first_chunk=entry.first_chunk,
        parks=entry.parks,
        priority=entry.request.priority + spec.priority,
        deadline_fps=entry.request.deadline_fps or spec.deadline_fps,
    )
    state.views[entry.id] = (entry, view)
    return view
