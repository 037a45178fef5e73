"""What the demo found out: a row per stream, a summary, and whether its promises held."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from world_model.evaluate import psnr
from world_streams import Shot, WorldStream

from qvg_paged import CacheConfig, CacheStats, PageFormat

__all__ = ["MIN_PSNR", "MIN_QUANTISED_SHARE", "Check", "PooledRun", "StreamRun", "demo_results"]

MIN_QUANTISED_SHARE = 0.7
"""Of the history tokens that the last chunk of a stream reads, at least so many are 2-bit."""
MIN_PSNR = 30.0
"""Decibels that every stream reaches against its own unquantised run, mean over generated frames."""
MAX_PSNR = 100.0


@dataclass(frozen=True)
class Check:
    """One thing the demo promises."""

    name: str
    held: bool
    text: str


@dataclass
class StreamRun:
    """What is known of a stream once it is done."""

    waits: int = 0
    started: float = 0.0  # of generation
    seconds: float = 0.0
    nbytes: int = 0
    finished: bool = False
    decision: str = ""


@dataclass
class PooledRun:
    """What is known of the run from the shared pool."""

    streams: dict[str, WorldStream] = field(default_factory=dict)
    books: dict[str, StreamRun] = field(default_factory=dict)
    resident: int = 0
    used_nbytes: list[int] = field(default_factory=list)
    dense_nbytes: list[int] = field(default_factory=list)
    stats: CacheStats | None = None


def demo_results(
    config: CacheConfig, dense_nbytes: int, shots: Sequence[Shot], pooled: PooledRun, reference: dict[str, Tensor]
) -> dict[str, Any]:
    """``results`` of the demo's result file: `rows` (one per stream), `summary`, `series` and `checks`.

    Args:
        config: of the pool.
        dense_nbytes: bytes of one stream's cache, unquantised.
        shots: what the streams show.
        pooled: the run from the shared pool.
        reference: every stream from an unquantised cache, ``[frames, 3, resolution, resolution]`` by id.
    """
    rows = [_row(shot, pooled, reference[shot.id], dense_nbytes) for shot in shots]
    stats = pooled.stats
    assert stats is not None
    assert isinstance(config.memory, int)
    done = [row for row in rows if row["finished"]]
    summary = {
        "memory_nbytes": config.memory,
        "peak_nbytes": stats.peak_total_nbytes,
        "peak_pool_nbytes": stats.peak_nbytes,
        "budget": {name: getattr(stats.budget, name) for name in ("pool", "staging", "encode", "overhead")},
        "dense_stream_nbytes": dense_nbytes,
        "dense_nbytes": dense_nbytes * len(shots),
        "nbytes": sum(row["nbytes"] for row in done),
        "dense_streams_in_memory": config.memory / dense_nbytes,
        "resident": pooled.resident,
        "quantised_share": min((row["quantised_share"] for row in done), default=0.0),
        "psnr": sum(row["psnr"] for row in done) / max(1, len(done)),
        "worst_psnr": min((row["psnr"] for row in done), default=0.0),
        "frames_per_second": sum(row["frames_per_second"] for row in done),
    }
    series = {"used_nbytes": pooled.used_nbytes, "dense_nbytes": pooled.dense_nbytes}
    checks = _checks(cast(PageFormat, config.format), rows, summary)
    return {"rows": rows, "summary": summary, "series": series, "checks": checks}


def _row(shot: Shot, pooled: PooledRun, reference: Tensor, dense_nbytes: int) -> dict[str, Any]:
    books = pooled.books[shot.id]
    row: dict[str, Any] = {"stream": shot.id, "tenant": shot.tenant, "finished": books.finished,
                           "decision": books.decision, "waits": books.waits, "dense_nbytes": dense_nbytes}  # fmt: skip
    if not books.finished:
        return row
    stream = pooled.streams[shot.id]
    video, truth = torch.stack(stream.video[shot.given :]), shot.truth[shot.given :].to(reference.device)
    own = psnr(video, reference[shot.given :]).clamp_max(MAX_PSNR)
    return row | {
        "nbytes": books.nbytes,
        "ratio": dense_nbytes / books.nbytes,
        "quantised_share": stream.last_read.quantised_share,
        "frames_per_second": (shot.frames - shot.given) / books.seconds,
        "psnr": own.mean().item(),
        "psnr_first": own[0].item(),
        "psnr_last": own[-1].item(),
        "psnr_curve": [round(x, 3) for x in own.tolist()],
        "psnr_truth": psnr(video, truth).mean().item(),
        "psnr_truth_dense": psnr(reference[shot.given :], truth).mean().item(),
    }


def _bits(fmt: PageFormat) -> int:
    return max(fmt.key.grid.bits or 16, fmt.value.grid.bits or 16)


def _checks(fmt: PageFormat, rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[Check]:
    unfinished = [f"{row['stream']}: {row['decision']}" for row in rows if not row["finished"]]
    fits, half = summary["dense_streams_in_memory"], len(rows) / 2
    bits, share, worst = _bits(fmt), summary["quantised_share"], summary["worst_psnr"]
    share = share if bits == 2 else 0.0
    return [
        Check("every stream finished", not unfinished, "; ".join(unfinished) or f"{len(rows)} of {len(rows)}"),
        Check("all resident at once", summary["resident"] == len(rows), f"{summary['resident']} of {len(rows)}"),
        Check("too little memory without quantisation", fits < half,
              f"the budget holds {fits:.2f} unquantised caches; fewer than {half:g} promised"),
        Check("peak inside the budget", summary["peak_nbytes"] <= summary["memory_nbytes"],
              f"{summary['peak_nbytes']:,} of {summary['memory_nbytes']:,} bytes"),
        Check("history read in 2 bits", share >= MIN_QUANTISED_SHARE,
              f"{share:.0%} of the tokens at the end; at least {MIN_QUANTISED_SHARE:.0%} promised"),
        Check("close to the unquantised run", worst >= MIN_PSNR,
              f"worst stream {worst:.2f} dB; at least {MIN_PSNR:g} dB promised"),
    ]  # fmt: skip
