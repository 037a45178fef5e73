"""Curves over the time of a run, from its event log: what fills the pool, and what each tenant gets."""

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

__all__ = ["FORMATS", "curves"]

FORMATS = ("unquantised", "quantised", "codebooks")
TENANTS = 8
POINTS = 400


def curves(lines: Iterable[str], points: int = POINTS) -> dict[str, Any]:
    """Bytes by format, promised bytes and cost units by tenant, streams that run, wait and are parked, over time.

    Tenants beyond the eight largest are shown together as ``others``; of a long run, every n-th step.
    """
    rows = _rows(lines)
    every = max(1, -(-len(rows) // points))
    shown = rows[::every]
    totals: dict[str, float] = defaultdict(float)
    for row in rows[-1:]:
        totals.update(row["service"])
    names = sorted(totals, key=lambda name: (-totals[name], name))[:TENANTS]
    return {
        "seconds": [row["t"] for row in shown],
        "formats": {name: [row["used"][place] for row in shown] for place, name in enumerate(FORMATS)},
        "tenants": {name: [row["held"].get(name, 0) for row in shown] for name in names}
        | {"others": [sum(row["held"].values()) - sum(row["held"].get(n, 0) for n in names) for row in shown]},
        "service": {name: [row["service"].get(name, 0.0) for row in shown] for name in names},
        "running": [row["running"] for row in shown],
        "waiting": [row["waiting"] for row in shown],
    }


def _rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One row per plan."""
    tenant_of: dict[str, str] = {}
    alive: set[str] = set()
    service: dict[str, float] = defaultdict(float)
    rows: list[dict[str, Any]] = []
    row: dict[str, Any] = {}
    config: dict[str, float] = {}
    pool = 1
    for line in lines:
        record = json.loads(line)
        kind = record["kind"] if record["kind"] != "engine" else record["event"]
        if kind == "open":
            config, pool = record["config"], record["pool_nbytes"]
        elif kind == "submit" and record["reason"] == "queued":
            tenant_of[record["id"]] = record["tenant"]
            alive.add(record["id"])
        elif kind == "plan":
            alive -= {name for name, _ in record["finished"]}
            held: dict[str, int] = defaultdict(int)
            for name, _, _, nbytes in record["running"]:
                held[tenant_of[name]] += nbytes
            running = len(record["running"])
            row = {"held": dict(held), "running": running, "waiting": len(alive) - running, "chunks": record["running"]}
        elif kind == "cancel":
            alive.discard(record["id"])
        elif kind == "memory":
            row["used"] = record["used"]
        elif kind == "clock" and row:
            seconds = record["t"] - (rows[-1]["t"] if rows else 0.0)
            for name, _, _, nbytes in row.pop("chunks"):
                cost = config["chunk_cost"] + config["pool_second_cost"] * seconds * nbytes / pool
                service[tenant_of[name]] += cost
            rows.append({**row, "t": record["t"], "service": dict(service)})
            row = {}
    return rows
