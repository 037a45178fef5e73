"""How fast streams leave the pool and come back, beside plain copies between the device and pinned memory.

    python benchmarks/park_bench.py [--device cuda] [--geometry self-forcing] [--frames 27] [--disk FOLDER] --json FILE

A stream of random K and V is parked on the host and resumed, over and over; every time its digests must be what they
were. The yardstick is one copy of as many contiguous bytes from and to pinned memory. Digests are part of the measured
time, the first park (which pins the host memory) is reported apart. With --disk the same through files. Exit status 0:
every byte came back and, on a GPU, park and resume reach 85 % of the plain copies.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import results_file
import torch

from qvg_paged import CacheConfig, KVCacheManager, ModelSpec, Stream, Tier, Window
from qvg_paged.budget import Budget

BOUND = 0.85
GEOMETRIES = {
    "self-forcing": ModelSpec(num_layers=30, num_kv_heads=12, head_dim=128, tokens_per_frame=1560, frames_per_chunk=3),
    "small": ModelSpec(num_layers=8, num_kv_heads=4, head_dim=64, tokens_per_frame=256, frames_per_chunk=3),
}
FORMATS = ("dense", "qvg4-int2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--geometry", choices=sorted(GEOMETRIES), default=None, help="default: small on a CPU")
    parser.add_argument("--frames", type=int, default=27, help="frames of the stream (default: 27)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=FORMATS, nargs="+", default=FORMATS, help="formats (default: all)")
    parser.add_argument("--disk", type=Path, help="folder for files")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args(arguments)
    options.geometry = options.geometry or ("small" if options.device == "cpu" else "self-forcing")
    rows: list[dict[str, Any]] = []
    good = True
    for name in options.only:
        rows.append(measure(options, name))
        good = all(row["identical"] for row in rows)
        if torch.device(options.device).type == "cuda":
            good = good and all(min(row["park_share"], row["resume_share"]) >= BOUND for row in rows)
        if options.json:
            _write(options, {"rows": rows, "bound": BOUND, "good": good})
    return 0 if good else 1


def _write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """The result file, as far as things have come."""
    config = {key: value for key, value in vars(options).items() if key not in ("json", "disk")}
    config["disk"] = options.disk is not None
    results_file.write(options.json, results_file.result(device=options.device, config=config, results=results))


def measure(options: argparse.Namespace, fmt: str) -> dict[str, Any]:
    """Everything about one format."""
    model = GEOMETRIES[options.geometry]
    stream = make_stream(model, options, fmt)
    cache = stream.manager
    before, nbytes = stream.digests(), cache.stats().used_nbytes
    out, back = plain_copies(cache, nbytes, options.repeats)
    first = timed(cache, stream.park)
    stream.resume()
    park, resume, late = [], [], []
    identical = True
    for _ in range(options.repeats):
        park.append(timed(cache, stream.park))
        resume.append(timed(cache, stream.resume))
        identical = identical and stream.digests() == before
    for _ in range(options.repeats):
        stream.park()
        stream.prefetch_resume()
        synchronise(cache)
        late.append(timed(cache, stream.resume))
    row: dict[str, Any] = {
        "format": fmt,
        "nbytes": nbytes,
        "first_park_seconds": first,
        "park_gb_s": rate(nbytes, park),
        "resume_gb_s": rate(nbytes, resume),
        "plain_out_gb_s": rate(nbytes, out),
        "plain_back_gb_s": rate(nbytes, back),
        "resume_after_prefetch_ms": 1e3 * statistics.median(late),
    }
    row["park_share"] = row["park_gb_s"] / row["plain_out_gb_s"]
    row["resume_share"] = row["resume_gb_s"] / row["plain_back_gb_s"]
    if options.disk is not None:
        files = [(timed(cache, lambda: stream.park(Tier.DISK)), timed(cache, stream.resume)) for _ in range(3)]
        row["disk_park_gb_s"] = rate(nbytes, [seconds for seconds, _ in files])
        row["disk_resume_gb_s"] = rate(nbytes, [seconds for _, seconds in files])
        identical = identical and stream.digests() == before
    row["identical"] = identical and stream.digests() == before
    print(
        f"{fmt}: {nbytes / 1e9:.2f} GB, park {row['park_gb_s']:.1f} GB/s ({row['park_share']:.0%} of a plain copy), "
        f"resume {row['resume_gb_s']:.1f} GB/s ({row['resume_share']:.0%}), "
        f"after a prefetch {row['resume_after_prefetch_ms']:.1f} ms, bytes {'same' if row['identical'] else 'DIFFER'}"
    )
    return row


def make_stream(model: ModelSpec, options: argparse.Namespace, fmt: str) -> Stream:
    """A stream with that many frames of noise in a pool that holds it and little else."""
    fields: dict[str, Any] = {"format": fmt, "span_frames": min(12, options.frames), "device": options.device}
    window = Window(recent_frames=options.frames)
    books = Budget.split(model, CacheConfig(memory="1024GiB", **fields))
    stored = (options.frames + 2 * model.frames_per_chunk) * model.frame_nbytes
    memory = int(1.3 * stored) + books.staging + books.encode + 64 * model.frame_nbytes // 8
    if options.disk is not None:
        fields |= {"disk_path": options.disk, "disk_memory": 2 * stored}
    cache = KVCacheManager(model, CacheConfig(memory=memory, host_memory=stored, **fields))
    stream = cache.open("stream", window=window)
    shape = (2, model.frames_per_chunk * model.tokens_per_frame, model.num_kv_heads, model.head_dim)
    while stream.committed < options.frames:
        with stream.begin_chunk() as chunk:
            for layer in range(model.num_layers):
                k, v = torch.randn(shape, device=options.device, dtype=model.dtype)
                chunk.write(layer, k, v)
            chunk.commit()
    return stream


def plain_copies(cache: KVCacheManager, nbytes: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of one copy of `nbytes` contiguous bytes out of the pool's device and back."""
    pinned = cache.device.type == "cuda"
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
    device = torch.empty(nbytes, dtype=torch.uint8, device=cache.device)
    host.fill_(1)
    timed(cache, lambda: device.copy_(host, non_blocking=True))
    out = [timed(cache, lambda: host.copy_(device, non_blocking=True)) for _ in range(repeats)]
    back = [timed(cache, lambda: device.copy_(host, non_blocking=True)) for _ in range(repeats)]
    return out, back


def timed(cache: KVCacheManager, call: Callable[[], object]) -> float:
    """Seconds of a call and of what it launched."""
    synchronise(cache)
    start = time.perf_counter()
    call()
    synchronise(cache)
    return time.perf_counter() - start


def synchronise(cache: KVCacheManager) -> None:
    """Wait for the device."""
    if cache.device.type == "cuda":
        torch.cuda.synchronize(cache.device)


def rate(nbytes: int, seconds: list[float]) -> float:
    """Median, in 1e9 bytes per second."""
    return nbytes / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    sys.exit(main())
