"""Checks of a plan against the room there is: promises, limits, quotas, floors, and whether anybody waits in vain."""

from collections.abc import Mapping
from typing import Any

from stress.ledger import Ledger, Stream

__all__ = ["check_line", "check_memory"]

SCARCE = ("no memory", "no slot", "floor", "no host memory")
CLAIM_PLANS = 8


def check_memory(ledger: Ledger, seen_running: set[str]) -> None:
    """Promises keep within the pool, its limit and the ceilings, as far as streams can be parked."""
    promised = sum([nbytes for _, _, nbytes, _ in ledger.held])
    pool = ledger.open["pool_nbytes"]
    ledger.expect("accounting", promised <= pool, f"{promised} of {pool} bytes are promised")
    if ledger.limit is not None and promised > ledger.limit:
        free = [name for name in ledger.planned if name != ledger.leader and not ledger.pinned(name)]
        ledger.expect("limit", not free, f"{promised} of {ledger.limit} bytes are promised, {free} could go")
    for tenant, nbytes in ledger.tenant_nbytes().items():
        ceiling = ledger.tenants[tenant].ceiling
        if ceiling is not None and nbytes > ceiling:
            _check_ceiling(ledger, tenant, f"{tenant!r} holds {nbytes} of {ceiling} bytes", seen_running)


def _check_ceiling(ledger: Ledger, tenant: str, text: str, seen_running: set[str]) -> None:
    mine = [name for name in ledger.planned if ledger.streams[name].tenant == tenant]
    free = [name for name in mine if name != ledger.leader and not ledger.pinned(name)]
    ledger.expect("quota", not free, f"{text}, {free} could go")
    new = [name for name in mine if ledger.planned[name][0] == 0 and name not in seen_running]
    ledger.expect("quota", ledger.parks or not new, f"{new} were admitted above the ceiling of {tenant!r}")


def check_line(ledger: Ledger, plan: dict[str, Any]) -> None:
    """Reasons are true, and nobody waits while there is room."""
    line, reasons = ledger.places.waiting, ledger.places.reasons
    for name, reason in plan["waiting"]:
        if name in line:
            ledger.places.tell(name, reason)
        else:
            ledger.expect("transitions", False, f"{name!r} is told to wait as {reason!r} and is not in line")
    held = ledger.tenant_nbytes()
    _check_reasons(ledger, reasons, sum(held.values()))
    if reasons["behind"]:
        blocked = any(reasons[reason] for reason in SCARCE)
        ledger.expect("work conservation", blocked, f"{[*reasons['behind']]} wait behind nobody")
    if reasons["hold off"]:
        declared = (plan["hold"] and bool(ledger.places.parked)) or bool(plan["resumed"])
        ledger.expect("work conservation", declared, f"{[*reasons['hold off']]} wait without need")
    ledger.expect("reasons", not reasons["queued"], f"not told why: {[*reasons['queued']]}")
    if not ledger.planned and line and ledger.limit is None:
        barred = all(ledger.tenants[s.tenant].ceiling is not None for s in line.values())
        ledger.expect("work conservation", barred, f"nothing runs, {len(line)} streams wait")
    _check_claims(ledger, line, held)


def _check_reasons(ledger: Ledger, reasons: Mapping[str, Mapping[str, Stream]], promised: int) -> None:
    config = ledger.open["config"]
    pool = ledger.open["pool_nbytes"] if ledger.limit is None else ledger.limit
    streams, free = ledger.streams, 0.8 * (pool - ledger.reserve) * (1 - config["headroom"])
    for name in [name for name in reasons["no memory"] if promised + streams[name].worst <= free]:
        ledger.expect("work conservation", False, f"{name!r} waits for memory, of which there is enough")
    full = len(ledger.planned) >= (config["max_running"] or 0) > 0
    for name in reasons["no slot"] if not full else ():
        ledger.expect("work conservation", False, f"{name!r} waits for a slot, of which there are enough")
    for name in reasons["quota"]:
        ceiling = ledger.tenants[ledger.streams[name].tenant].ceiling
        ledger.expect("reasons", ceiling is not None, f"{name!r} waits for a quota that its tenant does not have")


def _check_claims(ledger: Ledger, line: dict[str, Stream], held: dict[str, int]) -> None:
    """A tenant below its floor does not wait long for what the floor entitles it to."""
    floors = {name: tenant for name, tenant in ledger.tenants.items() if tenant.floor}
    if not floors or ledger.limit is not None or not ledger.roomy():
        return
    capped = ledger.open["config"]["min_chunks"] > 1
    for name, tenant in floors.items():
        due = [s for s in line.values() if s.tenant == name and held.get(name, 0) + s.worst <= tenant.floor]
        others = [n for n in ledger.planned if ledger.streams[n].tenant != name and not ledger.pinned(n)]
        tenant.claiming = tenant.claiming + 1 if due and others and not capped else 0
        ledger.expect("floor", tenant.claiming <= CLAIM_PLANS, f"{name!r} has been below its floor for too long")
