"""Times of encoding and decoding on one GPU, beside the released Quant VideoGen code and a plain copy.

    python benchmarks/encode_bench.py --json FILE [--official CHECKOUT] [--variants]

A span of K and V, ``[heads, frames * tokens, head_dim]`` BF16 with clusters, channel gains and noise, goes from
unquantised pages into quantised ones as the cache manager does it, and back. First it is checked: the same bytes
twice, and each tensor alone the same as in company; the bytes of a small span equal to the CPU's, given centroids and
ids; the error beside that of the released code. Then everything is timed with CUDA events, medians of many.
CHECKOUT is a clone of the Quant VideoGen repository. `--variants` times tile shapes of every kernel as well.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import results_file
import torch
from bench.released import load_modules

from qvg_paged.kernels import (
    _centroids_triton,
    _decode_triton,
    _encode_triton,
    _kmeans_triton,
    _span_plan,
    _span_triton,
    _spread_triton,
    _tokens_triton,
)
from qvg_paged.kernels._span_plan import scratch_nbytes, seen_stride, workspace_nbytes
from qvg_paged.kernels._span_workspace import Workspace
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.formats import DENSE, FORMATS, PageFormat
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.kernels.rope import RoPESpec
from qvg_paged.kernels.span import SpanEncoding

GRID = (30, 52)
ITERATIONS = 2
FORMAT_NAMES = ("qvg4-int2", "qvg-int2")
SHAPES = {
    "assign": (_kmeans_triton, "HOPPER_ASSIGN", [
        {"AHEAD": 2, "num_warps": 4}, {"AHEAD": 2, "num_warps": 8}, {"AHEAD": 3, "num_warps": 8},
    ]),
    "update": (_kmeans_triton, "HOPPER_SUM", [
        {"AHEAD": 3, "num_warps": 8}, {"AHEAD": 2, "num_warps": 8}, {"AHEAD": 4, "num_warps": 8},
    ]),
    "sample": (_tokens_triton, "SEEN_RUN", [64 * 36, 64 * 18]),
    "pack": (_encode_triton, "SEARCH_PACK", [
        {"R": 16, "W": 4, "num_warps": 2}, {"R": 8, "W": 4, "num_warps": 1}, {"R": 32, "W": 4, "num_warps": 4},
        {"R": 16, "W": 4, "num_warps": 4}, {"R": 8, "W": 2, "num_warps": 2}, {"R": 8, "W": 1, "num_warps": 2},
        {"R": 16, "W": 4, "num_warps": 2, "maxnreg": 128}, {"R": 16, "W": 4, "num_warps": 2, "maxnreg": 144},
    ]),
    "spread": (_span_plan, "MOMENT_TOKENS", [512, 1024, 256]),
    "decode": (_decode_triton, "DECODE", [
        {"R": 16, "H": 4, "num_warps": 4}, {"R": 16, "H": 1, "num_warps": 4}, {"R": 8, "H": 1, "num_warps": 2},
        {"R": 32, "H": 1, "num_warps": 8},
    ]),
    "decode and turn": (_decode_triton, "PAIRED", [
        {"R": 8, "H": 6, "num_warps": 4, "maxnreg": 96}, {"R": 8, "H": 4, "num_warps": 4, "maxnreg": 96},
        {"R": 8, "H": 6, "num_warps": 4}, {"R": 8, "H": 1, "num_warps": 4},
    ]),
}  # fmt: skip


class Span:
    """K and V of one layer of a span in a pool of their own: unquantised pages, quantised ones, a codebook."""

    def __init__(self, fmt: PageFormat, frames: int, tokens: int, heads: int, dim: int, device: str) -> None:
        shape = {"num_layers": 1, "tokens": tokens, "heads": heads, "head_dim": dim, "dtype": torch.bfloat16,
                 "span_tokens": frames * tokens, "split_pairs": True}  # fmt: skip
        self.source, self.target = (PageLayout.build(f, **shape) for f in (DENSE, fmt))
        self.frames, self.device = frames, torch.device(device)
        sizes = [self.source.page_nbytes] * frames + [self.target.page_nbytes] * frames + [self.target.codebook_nbytes]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        self.dense, self.pages = ([s // GRANULE for s in starts[i : i + frames]] for i in (0, frames))
        self.codebook = starts[-1] // GRANULE
        self.pool = torch.zeros(ends[-1], dtype=torch.uint8, device=device)

    def tensor(self, part: int) -> torch.Tensor:
        """K or V as stored unquantised, ``[tokens, heads, dim]``: a copy."""
        plane, start = self.source.key.plane("values"), part * self.source.key.nbytes
        return torch.cat([plane.view(self.pool, page * GRANULE + start) for page in self.dense])

    def fill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        plane, tokens = self.source.key.plane("values"), self.source.key.tokens
        for part, x in enumerate((k, v)):
            for frame, page in enumerate(self.dense):
                at = page * GRANULE + part * self.source.key.nbytes
                plane.view(self.pool, at).copy_(x[frame * tokens : (frame + 1) * tokens])

    def encoding(self) -> SpanEncoding:
        return SpanEncoding(self.pool, self.source, self.target, self.dense, self.pages, self.codebook)

    def stored(self) -> torch.Tensor:
        return self.pool[self.pages[0] * GRANULE :]

    def decode(self, part: int, out: torch.Tensor, rope: Any = None) -> Callable[[], None]:
        """A call that decodes K or V."""
        target = self.target
        layout = target.value if part else target.key
        offsets = (target.value_offset(0), target.value_codebook_offset(0)) if part else (0, 0)
        pages = torch.tensor(self.pages, dtype=torch.int32, device=self.device)
        books = torch.full_like(pages, self.codebook)
        return lambda: decode_pages(self.pool, pages, books, layout, *offsets, out, rope=rope)


def video_like(tokens: int, heads: int, dim: int, device: str, clusters: int = 400) -> torch.Tensor:
    """Tokens around centres that drift, channels of unequal gain: what K and V of video look like."""
    centres = torch.randn(heads, clusters, dim, device=device)
    gain = torch.logspace(-0.5, 0.8, dim, device=device)[torch.randperm(dim, device=device)]
    label = torch.randint(0, clusters, (tokens, heads), device=device)
    x = centres[torch.arange(heads, device=device), label] + 0.6 * torch.randn(tokens, heads, dim, device=device)
    return (x * gain).bfloat16()


def milliseconds(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, least and 90th percentile of the time of a call on the GPU, launched from the host each time."""
    for _ in range(3):
        call()
    return _times(call, repeats, 1)


def graph_milliseconds(call: Callable[[], object], repeats: int, calls: int = 5) -> dict[str, float]:
    """The same without the host: several calls in a CUDA graph, which nothing that waits for the host can enter."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    return _times(graph.replay, repeats, calls)


def _times(call: Callable[[], object], repeats: int, calls: int) -> dict[str, float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / calls for begin, end in events)
    return {"median": statistics.median(times), "min": times[0], "p90": times[int(0.9 * len(times))]}


def host_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time until a call returns, the device idle at its start."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / milliseconds(lambda: y.copy_(x), repeats)["median"] * 1e3


def check_small(fmt: PageFormat) -> bool:
    """A small span given centroids and ids: the GPU's bytes are the CPU's."""
    frames, tokens, heads, dim = 2, 300, 2, 128
    same = True
    for part in (0, 1):
        spans = [Span(fmt, frames, tokens, heads, dim, device) for device in ("cpu", "cuda")]
        layout = spans[0].target.value if part else spans[0].target.key
        x = video_like(frames * tokens, heads, dim, "cpu")
        count = layout.num_centroids
        centroids = 0.3 * torch.randn(layout.codec.stages, heads, count, dim)
        ids = torch.randint(0, count, (layout.codec.stages, heads, len(x))).to(torch.uint8)
        for span in spans:
            offsets = [page * GRANULE for page in span.pages]
            encode_part(
                x.to(span.device), layout, span.pool, offsets, span.codebook * GRANULE,
                initial_centroids=centroids.to(span.device), ids=ids.to(span.device),
            )  # fmt: skip
        same &= torch.equal(spans[0].pool, spans[1].pool.cpu())
        for rope in (None, RoPESpec(head_dim=dim, grid=(15, 20))):
            read = []
            for span in spans:
                out = torch.empty(frames * tokens, heads, dim, dtype=torch.bfloat16, device=span.device)
                tables = None if rope is None or part else rope.tables([3.0, 9.0], span.device)
                pages = torch.tensor(span.pages, dtype=torch.int32, device=span.device)
                books = torch.full_like(pages, span.codebook)
                decode_pages(span.pool, pages, books, layout, 0, 0, out, rope=tables)
                read.append(out.cpu())
            same &= torch.equal(*read)
    return same


def check_alone(span: Span) -> bool:
    """Twice the same bytes, and each tensor alone the same as in company."""
    span.encoding().encode(0)
    together = span.stored().clone()
    span.stored().zero_()
    span.encoding().encode(0)
    same = torch.equal(together, span.stored())
    span.stored().zero_()
    target = span.target
    for part, layout in enumerate((target.key, target.value)):
        inside, book = part * target.key.nbytes, part * target.key.codebook_nbytes
        offsets = [page * GRANULE + inside for page in span.pages]
        encode_part(span.tensor(part), layout, span.pool, offsets, span.codebook * GRANULE + book)
    return same and torch.equal(together, span.stored())


def relative_error(read: torch.Tensor, x: torch.Tensor) -> float:
    """Root of the energy of the difference over that of `x`."""
    error = read.float().sub_(x.float())
    return float((error.double().square().sum() / x.double().square().sum()).sqrt())


def measure(span: Span, k: torch.Tensor, v: torch.Tensor, copy: float, repeats: int) -> dict[str, Any]:
    """Times, errors and bandwidths of one format."""
    encoding = span.encoding()
    row: dict[str, Any] = {"repeats_itself_and_alone": check_alone(span)}
    encoding.encode(0)
    row["encode_ms"] = milliseconds(lambda: encoding.encode(0), repeats)
    row["encode_graph_ms"] = graph_milliseconds(lambda: encoding.encode(0), repeats, 1)
    row["encode_host_us"] = host_microseconds(lambda: encoding.encode(0), repeats)
    out = torch.empty_like(k)
    stored = span.frames * span.target.key.nbytes + span.target.key.codebook_nbytes
    moved = out.numel() * 2 + stored
    spec = RoPESpec(head_dim=k.shape[2], grid=GRID)
    tables = spec.tables([float(frame) for frame in range(span.frames)], torch.device("cuda"))
    for part, (name, x) in enumerate((("key", k), ("value", v))):
        call = span.decode(part, out)
        call()
        row[f"{name}_error"] = relative_error(out, x)
        row[f"decode_{name}_ms"] = graph_milliseconds(call, repeats)
    row["decode_key_rope_ms"] = graph_milliseconds(span.decode(0, out, tables), repeats)
    row["decode_bytes"] = moved
    for name in ("key", "value", "key_rope"):
        row[f"decode_{name}_share_of_copy"] = moved / row[f"decode_{name}_ms"]["median"] * 1e3 / copy
    return row


def stages_of(span: Span) -> dict[str, Callable[[], object]]:
    """Each launch of an encode by itself."""
    encoding = span.encoding()
    encoding.encode(0)
    key, value = span.target.key, span.target.value
    tokens, places = encoding.places(0, (0, 1))
    rows, device = range(2 * key.heads), span.device
    shape = (1, len(rows), key.num_centroids, key.head_dim)
    calls: dict[str, Callable[[], object]] = {}
    inverse = None
    scratch = torch.empty(len(rows) * scratch_nbytes(tokens.span_tokens, key) * 8, dtype=torch.uint8, device=device)
    workspace = Workspace(3 * len(rows) * tokens.span_tokens, device)
    stride = seen_stride(span.frames, key.tokens, key.num_centroids)
    if key.codec.balanced:
        inverse = torch.empty((len(rows), key.head_dim), device=device)
        calls["spread"] = lambda: _spread_triton.write_spread(
            tokens.sample(stride), (key, value), span.pool, places.books, rows, inverse, scratch
        )  # fmt: skip
        calls["spread"]()
    group = _tokens_triton.RowGroup(
        tokens, rows, inverse, _tokens_triton.empty_ids(1, len(rows), tokens.span_tokens, workspace),
        torch.empty(shape, dtype=torch.bfloat16, device=device), torch.empty(shape[1:3], device=device), scratch,
    )  # fmt: skip
    seeds = torch.arange(key.num_centroids, dtype=torch.int32, device=device) * 101 % tokens.span_tokens
    _centroids_triton.seed(group, 0, seeds, group.centroids[0])
    sample = _tokens_triton.sample_of(group, stride, workspace)
    for some in (group, sample):
        _kmeans_triton.assign(some, 0)
    means = torch.empty_like(group.centroids[0])
    return calls | {
        "seed": lambda: _centroids_triton.seed(group, 0, seeds, means),
        "assign": lambda: _kmeans_triton.assign(group, 0),
        "update": lambda: _centroids_triton.update(group, 0, means),
        "assign a sample": lambda: _kmeans_triton.assign(sample, 0),
        "update from a sample": lambda: _centroids_triton.update(
            replace(sample, run=_tokens_triton.SEEN_RUN), 0, means
        ),
        "centroids": lambda: _encode_triton.write_centroids(group, places, group.centroids, None),
        "pack": lambda: _encode_triton.pack(group, places),
    }


@contextlib.contextmanager
def shaped(kernel: str, shape: Any) -> Iterator[None]:
    module, name, _ = SHAPES[kernel]
    before = getattr(module, name)
    setattr(module, name, shape)
    try:
        yield
    finally:
        setattr(module, name, before)


def measure_variants(span: Span, repeats: int) -> list[dict[str, Any]]:
    """Times of every tile shape; one that fails is reported."""
    out = torch.empty_like(span.tensor(0))
    spec = RoPESpec(head_dim=out.shape[2], grid=GRID)
    tables = spec.tables([float(frame) for frame in range(span.frames)], torch.device("cuda"))
    calls = stages_of(span)
    turned = span.decode(0, out, tables)
    tried = {
        "decode": ["plain"], "decode and turn": ["turned"], "update": ["update", "update from a sample"],
        "sample": ["update from a sample"], "assign": ["assign", "assign a sample"],
    }  # fmt: skip
    calls |= {"plain": span.decode(0, out), "turned": turned}
    rows = []
    for kernel, (_, _, shapes) in SHAPES.items():
        for shape in shapes:
            with shaped(kernel, shape):
                for name in tried.get(kernel, [kernel]):
                    row = {"kernel": kernel, "call": name, "shape": str(shape)}
                    try:
                        row |= graph_milliseconds(calls[name], repeats)
                    except Exception as error:
                        row["failed"] = f"{type(error).__name__}: {error}"[:200]
                    rows.append(row)
    return rows


def compile_only(job: tuple[str, Any]) -> None:
    """Compile what one variant launches, into the compiler's cache, without a device. Runs in a process of its own."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    torch.set_num_threads(1)
    fmt_name, variant = job

    class Driver:
        class utils:  # noqa: N801 - Triton's name
            @staticmethod
            def load_binary(*_: Any) -> tuple[None, None, int, int, int]:
                return None, None, 0, 0, 1024

            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {"max_shared_mem": 227 << 10}

        def launcher_cls(self, *_: Any) -> Any:
            return lambda *_: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    triton.runtime.driver.set_active(Driver())
    launch = triton.runtime.jit.JITFunction.run

    def without_a_launch(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        return launch(self, *args, grid=grid, warmup=True, **options)

    triton.runtime.jit.JITFunction.run = without_a_launch
    _kmeans_triton.on_hopper = lambda _: True
    span = Span(quick(fmt_name), 24, 1560, 2, 128, "cpu")
    layout = span.target.key
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        if variant is not None:
            stack.enter_context(shaped(*variant))
        base = span.pool[: span.pool.numel() // 4 * 4].view(torch.bfloat16)
        starts = torch.zeros(2, 24, dtype=torch.int64)
        tokens = _span_triton.SpanTokens(base, starts, 256, 128, 1560, 2, 128)
        places = _span_triton.SpanPlaces(span.pool, (layout, span.target.value), starts, starts[:, 0].contiguous())
        if variant is None or not variant[0].startswith("decode"):
            _span_triton.encode_group(
                tokens, places, range(4), Workspace(4 * workspace_nbytes(layout, 24 * 1560), base.device)
            )
        if variant is None or variant[0].startswith("decode"):
            pages = torch.zeros(4, dtype=torch.int32)
            out = torch.zeros(4 * 1560, 2, 128, dtype=torch.bfloat16)
            tables = RoPESpec(head_dim=128, grid=GRID).tables([0.0, 1.0, 2.0, 3.0])
            for part, rope in ((layout, None), (layout, tables), (span.target.value, None)):
                _decode_triton.decode_pages(
                    span.pool, pages, pages, part, 0, 0, out, rope, _decode_triton.RoPELayout.INTERLEAVED
                )


def compile_ahead(names: tuple[str, ...], variants: bool) -> float:
    """Compile everything in parallel processes; seconds."""
    begin = time.perf_counter()
    jobs: list[tuple[str, Any]] = [(name, None) for name in names]
    if variants:
        jobs += [(names[0], (kernel, shape)) for kernel, (_, _, shapes) in SHAPES.items() for shape in shapes[1:]]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), 30)) as pool:
        pool.map(compile_only, jobs, chunksize=1)
    return time.perf_counter() - begin


def quick(name: str) -> PageFormat:
    """A format with two k-means iterations, as the released code runs."""
    return FORMATS[name].with_codecs(iterations=ITERATIONS)


def measure_official(path: Path, k: torch.Tensor, v: torch.Tensor, repeats: int) -> dict[str, Any]:
    """The released encoder and decoder on the same tensors, both in the layout they take."""
    prq = load_modules(path, ("real.prq",), configurations=6).prq
    ours = [x.transpose(0, 1)[None].contiguous() for x in (k, v)]  # [1, heads, tokens, dim]

    def encode(x: torch.Tensor) -> Any:
        return prq.prq_quant(
            x, 1, 256, 64, 2, torch.float8_e4m3fn, max_iters=ITERATIONS, PACK_OUTPUT_INT8=True, CLUSTER_ID_INT8=True
        )

    def decode(found: Any) -> torch.Tensor:
        centroids, ids, codes, scales, _ = found
        return prq.prq_dequant(centroids, ids, codes, scales, 64, 2, PACK_INPUT_INT8=True, CLUSTER_ID_INT8=True)

    found = [encode(x) for x in ours]
    row: dict[str, Any] = {}
    for name, x, one in zip(("key", "value"), ours, found, strict=True):
        row[f"{name}_error"] = relative_error(decode(one), x)
        row[f"decode_{name}_ms"] = milliseconds(lambda one=one: decode(one), repeats)
        row[f"decode_{name}_graph_ms"] = graph_milliseconds(lambda one=one: decode(one), repeats)
    row["encode_ms"] = milliseconds(lambda: [encode(x) for x in ours], repeats)
    row["encode_host_us"] = host_microseconds(lambda: [encode(x) for x in ours], repeats)
    return row


def main() -> int:
    """Check, measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--official", type=Path, help="clone of the Quant VideoGen repository")
    parser.add_argument("--variants", action="store_true", help="time tile shapes of every kernel")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    begin = time.perf_counter()
    compiled = compile_ahead(FORMAT_NAMES, args.variants)
    if not torch.cuda.is_available():
        raise SystemExit("encode_bench: expected a CUDA device, found none")
    torch.manual_seed(0)
    tokens = GRID[0] * GRID[1]
    results: dict[str, Any] = {"compile_s": compiled, "copy_bytes_per_s": copy_bandwidth(args.repeats)}
    print("compiled in", round(compiled, 1), "s; copy", results["copy_bytes_per_s"] / 1e12, "TB/s", flush=True)
    k, v = (video_like(args.frames * tokens, args.heads, 128, "cuda") for _ in range(2))

    def attempt(name: str, call: Callable[[], Any]) -> None:
        """One part that fails does not take the others with it."""
        try:
            results[name] = call()
        except Exception as error:
            results[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        print(f"[{time.perf_counter() - begin:.1f} s]", name, json.dumps(results[name])[:1800], flush=True)

    for name in FORMAT_NAMES:
        fmt = quick(name)
        attempt(f"{name}: bytes as on the CPU", lambda fmt=fmt: check_small(fmt))
        span = Span(fmt, args.frames, tokens, args.heads, 128, "cuda")
        span.fill(k, v)
        attempt(name, lambda span=span: measure(span, k, v, results["copy_bytes_per_s"], args.repeats))
        attempt(f"{name}: launches", lambda span=span: {
            stage: graph_milliseconds(call, args.repeats) for stage, call in stages_of(span).items()
        })  # fmt: skip
        if args.variants and name == FORMAT_NAMES[0]:
            attempt("variants", lambda span=span: measure_variants(span, max(5, args.repeats // 3)))
    if args.official:
        attempt("released", lambda: measure_official(args.official, k, v, args.repeats))
    content = results_file.result(device="cuda", config=vars(args), results=results)
    results_file.write(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
