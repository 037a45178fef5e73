"""Snapshots for policies, made from the state; those of streams that did not change are made once."""

from collections.abc import Mapping
from operator import attrgetter
from types import MappingProxyType

from qvg_paged.scheduler.state import Entry, Rules, State
from qvg_paged.scheduler.view import SystemView, TenantView

__all__ = ["may_be_parked", "system_view"]

VIEW = attrgetter("view")


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
        waiting=tuple(map(VIEW, state.waiting())),
        running=tuple(map(VIEW, running)),
        lines=MappingProxyType({name: tuple(line) for name, line in sorted(state.lines.items(), key=_first)}),
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


def _first(item: tuple[str, dict[str, int]]) -> int:
    return next(iter(item[1].values()))
