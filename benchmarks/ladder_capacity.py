"""How many streams one pool holds: unquantised, in 2 bits without the ladder, and on its first rung.

    python benchmarks/ladder_capacity.py [--memory 1128GiB] [--json FILE]

Reckoned, not run: the store's own arithmetic of pages, codebooks, open chunks, closing spans and slabs
(`tests/test_demote.py` checks it against the store object by object). Without the ladder every stream is promised its
worst case, as admission does that cannot take memory back; with it, what its next chunk needs, and all streams are at
the dearest chunk of their lives at the same time. Nothing is lost on
the first rung but what short spans cost: codebooks of their own, and quantisation before the window says so. Exit
status 0: for Self-Forcing and LingBot-World at least 3 times as many streams as unquantised, and 1.3 times as many as
in 2 bits without the ladder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_file
from stress.models import MODELS, Geometry

from qvg_paged import CacheConfig, Demand, Rung
from qvg_paged.budget import Budget, object_counts, page_layouts, stream_timeline
from qvg_paged.ladder import squeeze

DENSE_BOUND, STATIC_BOUND = 3.0, 1.3
NAMES = ("self-forcing", "longcat", "hy-worldplay", "lingbot-v2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1128GiB", help="of the manager (default: 1128GiB, eight H200)")
    parser.add_argument("--format", default="qvg4-int2")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args(arguments)
    rows = [capacity(name, MODELS[name], options) for name in NAMES]
    bound = [row for row in rows if row["model"] in ("self-forcing", "lingbot-v2")]
    good = all(row["times_dense"] >= DENSE_BOUND and row["times_static"] >= STATIC_BOUND for row in bound)
    for row in rows:
        print(
            f"{row['model']}: {row['dense']} unquantised, {row['static']} in 2 bits, {row['ladder']} on the ladder "
            f"({row['times_dense']:.2f}x, {row['times_static']:.2f}x)"
        )
    if options.json:
        config = {"memory": options.memory, "format": options.format}
        content = results_file.result(device="cpu", config=config, results={"rows": rows, "good": good})
        results_file.write(options.json, content)
    return 0 if good else 1


def capacity(name: str, geometry: Geometry, options: argparse.Namespace) -> dict[str, Any]:
    """Streams that fit, by how they are stored."""
    counts = {
        "dense": _fit(geometry, CacheConfig(memory=options.memory, format="dense"), Rung.NONE),
        "static": _fit(geometry, _config(geometry, options, None), Rung.NONE),
        "ladder": _fit(geometry, _config(geometry, options, options.format), Rung.TAIL),
    }
    row: dict[str, Any] = {"model": name, **counts}
    row["times_dense"] = counts["ladder"] / max(counts["dense"], 1)
    row["times_static"] = counts["ladder"] / max(counts["static"], 1)
    return row


def _config(geometry: Geometry, options: argparse.Namespace, demote_to: str | None) -> CacheConfig:
    return CacheConfig(
        memory=options.memory, format=options.format, span_frames=geometry.span_frames, demote_to=demote_to
    )


def _fit(geometry: Geometry, config: CacheConfig, rung: Rung) -> int:
    budget, layouts = Budget.split(geometry.model, config), page_layouts(geometry.model, config)
    timeline = squeeze(stream_timeline(config, geometry.window), rung, 0, geometry.model)
    chunk = geometry.model.frames_per_chunk
    if rung:
        worst = Demand()
        for committed in range(0, sum(_frames(geometry)) + 4 * geometry.span_frames, chunk):
            worst = worst.most(timeline.demand(committed, chunk))
    else:
        worst = timeline.worst_demand(chunk)
    count = 0
    while (
        budget.slabs.slabs_for(object_counts(layouts, worst * (count + 1) + budget.reserve)) <= budget.slabs.num_slabs
    ):
        count += 1
    return count


def _frames(geometry: Geometry) -> tuple[int, int, int]:
    window = geometry.window
    return window.sink_frames, window.recent_frames, window.retrieval_frames


if __name__ == "__main__":
    sys.exit(main())
