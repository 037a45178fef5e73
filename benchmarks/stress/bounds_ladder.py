"""What the ladder is worth: how many streams stay on the device, and how a load fares with it and without it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qvg_paged.budget import object_counts, stream_timeline
from qvg_paged.config import CacheConfig, Rung
from qvg_paged.ladder import squeeze
from qvg_paged.timeline import Demand, Timeline
from stress.bounds import Row, oversubscription
from stress.calibration import measured_costs
from stress.metrics import measure
from stress.models import MODELS, Costs, Geometry, StaticCache
from stress.presets import PRESETS
from stress.simulator import simulate
from stress.stats import mean

__all__ = ["ladder", "measured", "quality", "rungs"]

COSTS = (
    ("rungs_qvg_int4.json", "qvg-int4, dense tail", "qvg-int4, no dense tail from the turn on"),
    ("rungs_qvg_int4.json", "qvg-int4, dense tail", "qvg-int4, 2 bits from the turn on"),
    (
        "rungs_retrieval.json",
        "best-2bit, 8 recent frames and 56 to retrieve from",
        "best-2bit, 24 left to retrieve from",
    ),
)
"""Result file, and the rows before and after a rung: tails, spans, retrieval memory."""
POOL = 120 << 30
"""Of a GPU with 141 GB that holds the model besides."""


def _fit(cache: StaticCache, need: Demand) -> int:
    """How often a demand fits the pool."""
    count = 0
    while cache.slabs.slabs_for(object_counts(cache.layouts, need * (count + 1))) <= cache.slabs.num_slabs:
        count += 1
    return count


def _steady(timeline: Timeline, chunk: int) -> Demand:
    """Most that a stream ever has with an open chunk."""
    return timeline.worst_demand(chunk, None)


def streams(geometry: Geometry, pool: int = POOL) -> tuple[int, int, int]:
    """Streams that fit for ever, chunks open: unquantised, in 2 bits, and on the ladder's lowest rung."""
    model, window = geometry.model, geometry.window
    cache = StaticCache(geometry, pool)
    dense = StaticCache(geometry, pool, format="dense")
    chunk = model.frames_per_chunk
    config: CacheConfig = replace(cache.config, demote_to=cache.config.format)
    static = stream_timeline(cache.config, window)
    lowest = squeeze(stream_timeline(config, window), Rung.TAIL, 0, model)
    return (
        _fit(dense, Timeline(window, None).worst_demand(chunk, None)),
        _fit(cache, _steady(static, chunk)),
        _fit(cache, _steady(lowest, chunk)),
    )


def ladder() -> list[Row]:
    """Rows for Self-Forcing and LingBot-v2."""
    rows = []
    for name, heads in (("self-forcing", 12), ("lingbot-v2", 5)):  # LingBot's 40 heads are sharded over 8 ranks
        geometry = replace(MODELS[name], model=replace(MODELS[name].model, num_kv_heads=heads))
        dense, static, lowest = streams(geometry)
        text = (
            f"{POOL >> 30} GiB pool: {dense} streams unquantised, {static} in qvg4-int2 with dense tails, {lowest} "
            "without (rung TAIL: frames are quantised a chunk at a time); scratch of every open chunk counted"
        )
        for bound, base, what in ((3.0, dense, "unquantised"), (1.3, static, "2-bit without ladder")):
            ratio = lowest / base if base else float("inf")
            rows.append(
                Row(f"ladder, {name}: streams by {what}", f">= {bound}x", f"{ratio:.2f}x", ratio >= bound, text)
            )
    return rows


def quality(folder: Path) -> list[dict[str, str]]:
    """What a rung costs in pictures: closed loop against the same video from an unquantised cache, as recorded.

    Shown beside the bounds: how much a picture may cost is for a stream's floor to say.
    """
    rows = []
    for file, before, after in COSTS:
        if not (folder / file).exists():
            continue
        content = json.loads((folder / file).read_text())["results"]["rows"]
        found = {row["name"]: row["dense"]["mean"] for row in content}
        drop = found[after] - found[before]
        text = f"{after} ({found[after]:.2f} dB) after {before} ({found[before]:.2f} dB); {file} of {folder.name}"
        rows.append({"name": after, "value": f"{drop:+.2f} dB", "text": text})
    return rows


def rungs(seeds: Sequence[int], costs: Costs | None = None) -> list[Row]:
    """An overloaded pool whose streams are stored more cheaply first, against one that can only park."""
    rows = []
    for preset, what in (("ladder", "tails quantised"), ("retrieval", "spans and retrieval, too")):
        found: dict[bool, dict[str, float]] = {}
        for climbs in (True, False):
            base = PRESETS[preset]
            scenario = replace(base, ladder=base.ladder if climbs else "", costs=costs or base.costs)
            runs = [measure(simulate(scenario, seed).lines) for seed in seeds]
            assert not any(run.violations for run in runs)
            sums = [run.summary() for run in runs]
            found[climbs] = {name: mean([one[name] for one in sums]) for name in sums[0]}
        ours, theirs = found[True], found[False]
        goodput = ours["chunks_per_second_under_load"] / theirs["chunks_per_second_under_load"]
        text = (
            f"{what}: {ours['parks_per_chunk']:.3f} parks a chunk instead of {theirs['parks_per_chunk']:.3f}, "
            f"{ours['continuous_play_ratio']:.0%} of viewers never wait instead of "
            f"{theirs['continuous_play_ratio']:.0%}; {len(seeds)} seeds, costs: {scenario.costs.source}"
        )
        name = f"{preset} under load: goodput by that without"
        rows.append(Row(name, ">= 99 %", f"{goodput:.1%}", goodput >= 0.99, text))
        parks = ours["parks_per_chunk"] / (theirs["parks_per_chunk"] or 1.0)
        rows.append(Row(f"{preset} under load: parks by those without", "<= 1", f"{parks:.2f}", parks <= 1, text))
    return rows


def measured(path: Path, seeds: Sequence[int], tell: Callable[[str], None]) -> list[Row]:
    """Oversubscription and the ladder with costs from a result file of ``qvg-paged bench``; nothing without one."""
    if not path.exists():
        tell(f"no {path.name} of a GPU: costs stay round figures")
        return []
    costs = measured_costs(path, "self-forcing")
    ladders = [replace(row, name=f"{row.name}, measured costs") for row in rungs(seeds, costs)]
    return [*oversubscription(seeds, costs), *ladders]
