"""Rows of attention to every preset's pages beside those of the plain 2-bit format."""

from collections.abc import Callable, Iterator

import torch

from bench.attention import AttentionShape, paged_call, path_check, scratch
from bench.gate import AttentionGate
from bench.history import HistorySpec, thousands
from bench.rows import Case, System
from bench.settings import Bench
from qvg_paged.kernels import AttentionPath

__all__ = ["PLAIN", "READ", "preset_cases"]

PLAIN = "qvg-int2"
READ = (PLAIN, "qvg4-int2", "best-2bit", "balanced", "near-lossless")


def preset_cases(bench: Bench) -> Iterator[Case]:
    """One shape, read on the staged path from pages of each format."""
    queries, frames, tokens, heads, dim = (16, 6, 64, 2, 64) if bench.is_small else (4680, 18, 1560, 12, 128)
    keys = thousands(frames * tokens)
    about = {"queries": queries, "keys": frames * tokens, "heads": heads, "head_dim": dim, "formats": READ}
    yield Case(
        "attention", f"formats, {queries:,} queries, {keys} keys, {heads} heads", about,
        _systems(bench, queries, (frames,), tokens, heads, dim), PLAIN, ("presets, read path",),
    )  # fmt: skip


def _systems(
    bench: Bench, queries: int, frames: tuple[int, ...], tokens: int, heads: int, dim: int
) -> Callable[[], Iterator[System]]:
    def make() -> Iterator[System]:
        for name in READ:
            spec = HistorySpec(frames, tokens, heads, dim, format=name)
            history, shape = bench.history(spec), AttentionShape(queries, spec, heads)
            generator = torch.Generator(bench.device).manual_seed(bench.options.seed)
            q = torch.randn((queries, heads, dim), generator=generator, device=bench.device).bfloat16()
            cu = (0, queries)
            gate = AttentionGate(q, cu, heads, history.truth)
            run = paged_call(q, history, cu, AttentionPath.STAGED, scratch(spec, bench.device))
            check = path_check(gate, AttentionPath.STAGED)
            yield System(name, run, shape.work(history.stored_nbytes), check, history.sets, ours=True)

    return make
