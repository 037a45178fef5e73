"""Rows of attention to a quantised history."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from bench.dense_baselines import CPU, CUDNN, dense_systems, sdpa
from bench.gate import AttentionGate, Precision
from bench.history import SPAN_FRAMES, History, HistorySpec, thousands
from bench.released import ReleasedHistory
from bench.roofline import Work, attention_work
from bench.rows import Case, Gate, System
from bench.settings import Bench
from bench.xformers_paged import paged_caches
from qvg_paged.kernels import AttentionPath, BlockTable, Lookahead, paged_attention

__all__ = [
    "PATHS", "RELEASED_CUDNN", "RELEASED_FLASH", "TURNS", "AttentionShape", "attention_cases", "paged_call",
    "path_check", "path_name", "scratch",
]  # fmt: skip

TURNS = 3
FEW_QUERIES = 64
SCRATCH_NBYTES = 256 << 20
SCRATCH_MANY_HEADS_NBYTES = 1024 << 20
SMALL_SCRATCH_NBYTES = 4 << 20
MANY_CHANNELS = 12 * 128
DENSE_PAGES = "direct, BF16 pages"
RELEASED_CUDNN, RELEASED_FLASH = "released read + cuDNN", "released read + FlashAttention-2"


def path_name(path: AttentionPath) -> str:
    """Name of the system that attends by `path`."""
    return path.value.replace("_", " ").replace("-", " ")


PATHS = {path_name(path): path for path in AttentionPath if path is not AttentionPath.REFERENCE}
"""Our systems, `auto` last."""


def path_check(gate: AttentionGate, path: AttentionPath) -> Callable[[torch.Tensor], Gate]:
    """The gate with the tolerance of the number type that `path` computes in."""
    fp8 = "fp8" in path.value
    precision = Precision.EITHER if path is AttentionPath.AUTO else Precision.FP8 if fp8 else Precision.BF16
    return lambda out: gate.check(out, precision)


@dataclass(frozen=True)
class AttentionShape:
    """A row.

    Attributes:
        queries: of each sequence.
        history: pages of each sequence.
        q_heads: query heads.
        bounds: names of bounds it counts for.
        released: whether the released code reads the same history.
    """

    queries: int
    history: HistorySpec
    q_heads: int
    bounds: tuple[str, ...] = ()
    released: bool = False

    @property
    def name(self) -> str:
        """As in ``4680 queries, 28k keys, 12 heads``."""
        spec = self.history
        heads = f"{self.q_heads} heads" if self.q_heads == spec.heads else f"{self.q_heads}/{spec.heads} heads"
        name = f"{self.queries:,} quer{'y' if self.queries == 1 else 'ies'}, {thousands(spec.keys[0])} keys, {heads}"
        name += f", batch {len(spec.frames)}" if len(spec.frames) > 1 else ""
        name += f", dim {spec.head_dim}" if spec.head_dim != 128 else ""
        return name + (", RoPE on read" if spec.rope else "")

    def work(self, nbytes: float, product: str = "bf16") -> Work:
        """Of one way to store the history."""
        total = self.queries * len(self.history.frames)
        pairs = self.queries * sum(self.history.keys)
        return attention_work(pairs, total, self.q_heads, self.history.head_dim, nbytes, product)


def attention_cases(bench: Bench) -> Iterator[Case]:
    """All rows, those that share a history next to each other."""
    for shape in _shapes(bench):
        spec = shape.history
        about = {
            "queries": shape.queries, "keys": list(spec.keys), "q_heads": shape.q_heads, "kv_heads": spec.heads,
            "head_dim": spec.head_dim, "format": spec.format, "rope_on_read": spec.rope, "page_tokens": spec.tokens,
        }  # fmt: skip
        baseline = CPU if bench.is_small else CUDNN
        yield Case("attention", shape.name, about, _systems(bench, shape), baseline, shape.bounds, TURNS)


def _shapes(bench: Bench) -> Iterator[AttentionShape]:
    if bench.is_small:
        spec = HistorySpec((6,), 64, 2, 64)
        for queries in (1, 16) if bench.options.quick else (1, 16, 64):
            yield AttentionShape(queries, spec, 2)
        yield AttentionShape(16, HistorySpec((6,), 64, 2, 64, rope=True), 4)
        return
    if bench.options.quick:
        for queries in (16, 4680):
            yield AttentionShape(queries, HistorySpec((18,), 1560, 12), 12, _video_bounds(queries, 12), True)
        return
    yield from _video_shapes(18)
    for heads in (8, 32):
        yield AttentionShape(1, HistorySpec((32,) * 8, 1024, heads), 32, ("direct, 1 query",))
    yield from _video_shapes(53)
    for dim, heads in ((64, 24), (256, 6)):
        for queries in (16, 4680):
            yield AttentionShape(queries, HistorySpec((18,), 1560, heads, dim), heads)
    for queries in (16, 4680):
        yield AttentionShape(queries, HistorySpec((18,), 1560, 4), 32)


def _video_shapes(frames: int) -> Iterator[AttentionShape]:
    """Rows with bounds at a history of so many frames."""
    for heads in (12, 40):
        spec = HistorySpec((frames,), 1560, heads)
        for queries in (1, 16, 64, 1560, 4680, 9360):
            yield AttentionShape(queries, spec, heads, _video_bounds(queries, heads), queries >= 1560)
        yield AttentionShape(4680, HistorySpec((frames,), 1560, heads, rope=True), heads, ("staged, RoPE on read",))


def _video_bounds(queries: int, heads: int) -> tuple[str, ...]:
    if queries <= FEW_QUERIES:
        return ("direct, 16-64 queries",) if queries > 1 else ()
    read = ("released read + cuDNN", "released read, its attention")
    if queries == 1560:
        return ("staged, 1,560 queries", *read)
    staged = f"staged BF16, {queries:,} queries"
    found = ("staged FP8", staged, *((f"{staged}, 12 heads",) if heads == 12 else ()), *read)
    return (*found, "direct, 4,680 queries") if queries == 4680 else found


def _systems(bench: Bench, shape: AttentionShape) -> Callable[[], Iterator[System]]:
    def make() -> Iterator[System]:
        spec, batch = shape.history, len(shape.history.frames)
        history = bench.history(spec)
        generator = torch.Generator(bench.device).manual_seed(bench.options.seed)
        size = (shape.queries * batch, shape.q_heads, spec.head_dim)
        q = torch.randn(size, generator=generator, device=bench.device).bfloat16()
        cu = tuple(range(0, len(q) + 1, shape.queries))
        gate = AttentionGate(q, cu, spec.heads, history.truth)
        dense_work = shape.work(spec.dense_nbytes)
        for name, run in dense_systems(q, batch, history.dense):
            yield System(name, run, dense_work, gate.check, history.sets)
        yield from _our_systems(bench, q, cu, history, shape, gate)
        if not bench.is_small:
            pages = history.dense_pages()
            run = paged_call(q, pages, cu, AttentionPath.DIRECT, None)
            yield System(DENSE_PAGES, run, dense_work, gate.check, history.sets)
            del pages, run
        if shape.queries <= FEW_QUERIES and not bench.is_small:
            yield from _xformers_systems(q, cu, history, shape)
        if shape.released and bench.released is not None:
            yield from _released_systems(bench, q, cu, shape)

    return make


def scratch(spec: HistorySpec, device: torch.device) -> torch.Tensor:
    """Workspace that the bounds allow: twice 128 MiB for 12 heads, twice 512 MiB for more."""
    nbytes = SCRATCH_NBYTES if spec.heads * spec.head_dim <= MANY_CHANNELS else SCRATCH_MANY_HEADS_NBYTES
    return torch.empty(nbytes if device.type == "cuda" else SMALL_SCRATCH_NBYTES, dtype=torch.uint8, device=device)


def paged_call(
    q: torch.Tensor, history: History, cu: tuple[int, ...], path: AttentionPath, workspace: torch.Tensor | None,
    table: BlockTable | None = None, lookahead: Lookahead | None = None,
) -> Callable[[int], torch.Tensor]:  # fmt: skip
    """A call of `paged_attention` that takes the input set; with a lookahead, sets follow one another as layers do."""
    rope = history.spec.rope_spec
    where = history.table if table is None else table
    return lambda layer: paged_attention(
        q, history.buffer, where, [history.layout], layer, cu_seqlens_q=cu, rope=rope, path=path, workspace=workspace,
        lookahead=lookahead,
    )[0]  # fmt: skip


def _our_systems(
    bench: Bench, q: torch.Tensor, cu: tuple[int, ...], history: History, shape: AttentionShape, gate: AttentionGate
) -> Iterator[System]:
    """Each path of ours that runs on this device."""
    workspace, lookahead = scratch(history.spec, bench.device), Lookahead()
    for name, path in PATHS.items():
        if bench.is_small and path not in (AttentionPath.STAGED, AttentionPath.AUTO):
            continue
        run = paged_call(q, history, cu, path, workspace, lookahead=lookahead)
        work = shape.work(history.stored_nbytes, "fp8" if "fp8" in path.value else "bf16")

        notes = {"workspace_nbytes": workspace.numel()}
        yield System(name, run, work, path_check(gate, path), history.sets, ours=True, notes=notes)


def _xformers_systems(
    q: torch.Tensor, cu: tuple[int, ...], history: History, shape: AttentionShape
) -> Iterator[System]:
    for cache in paged_caches(*history.dense[0]):

        def truth(b: int, heads: list[int], read: tuple[torch.Tensor, ...] = cache.read) -> tuple[torch.Tensor, ...]:
            return tuple(x[b][:, heads].float() for x in read)

        gate = AttentionGate(q, cu, history.spec.heads, truth)
        attend = cache.attention(q)
        yield System(cache.name, lambda _, call=attend: call(), shape.work(cache.nbytes), gate.check)


def _released_systems(bench: Bench, q: torch.Tensor, cu: tuple[int, ...], shape: AttentionShape) -> Iterator[System]:
    spec = shape.history
    assert bench.released is not None
    spans = [min(SPAN_FRAMES, spec.frames[0] - start) * spec.tokens for start in range(0, spec.frames[0], SPAN_FRAMES)]
    released = ReleasedHistory.random(bench.released, spans, spec.heads, spec.head_dim, bench.device)
    gate = AttentionGate(q, cu, spec.heads, released.truth)
    heads_first = q.transpose(0, 1)[None].contiguous()
    for name, backend in ((RELEASED_CUDNN, SDPBackend.CUDNN_ATTENTION), (RELEASED_FLASH, SDPBackend.FLASH_ATTENTION)):

        def run(_: int, backend: SDPBackend = backend) -> torch.Tensor:
            return sdpa(backend, heads_first, *released.read())[0].transpose(0, 1)

        yield System(name, run, shape.work(released.nbytes), gate.check)
