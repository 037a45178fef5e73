"""Rows of a ragged batch: many streams with different histories in one call."""

from collections.abc import Callable, Iterator

import torch

from bench.attention import PATHS, TURNS, AttentionShape, paged_call, path_check, path_name, scratch
from bench.gate import AttentionGate
from bench.history import History, HistorySpec, sub_table
from bench.rows import Case, System
from bench.settings import Bench
from qvg_paged.kernels import AttentionPath, Lookahead

__all__ = ["EVEN", "SINGLE", "ragged_cases"]

SINGLE, EVEN = ", a call each", ", equal streams"


def ragged_cases(bench: Bench) -> Iterator[Case]:
    """Eight streams with different histories in one call, in a call each, and as many equal streams."""
    if bench.is_small:
        queries, spec, even = 16, HistorySpec((1, 2, 3, 6), 64, 2, 64), HistorySpec((3,) * 4, 64, 2, 64)
    else:
        queries, spec, even = (
            1560,
            HistorySpec((6, 9, 12, 15, 19, 22, 25, 28), 1560, 12),
            HistorySpec((17,) * 8, 1560, 12),
        )
    about = {"queries": queries, "keys": spec.keys, "q_heads": spec.heads, "kv_heads": spec.heads,
             "head_dim": spec.head_dim, "format": spec.format, "page_tokens": spec.tokens}  # fmt: skip
    name = f"{len(spec.frames)} streams of different lengths, {queries:,} queries each"
    bounds = ("ragged against single calls", "ragged against equal streams")
    yield Case(
        "attention", name, about, _ragged_systems(bench, queries, spec, even), path_name(AttentionPath.AUTO), bounds,
        TURNS,
    )


def _ragged_systems(bench: Bench, queries: int, spec: HistorySpec, even: HistorySpec) -> Callable[[], Iterator[System]]:
    def make() -> Iterator[System]:
        q = torch.randn(queries * len(spec.frames), spec.heads, spec.head_dim, device=bench.device).bfloat16()
        cu = tuple(range(0, len(q) + 1, queries))
        workspace, lookahead = scratch(spec, bench.device), Lookahead()
        paths = {name: path for name, path in PATHS.items() if not bench.is_small or path is AttentionPath.AUTO}
        for about, one in (("", spec), (EVEN, even)):
            history = bench.history(one)
            gate = AttentionGate(q, cu, one.heads, history.truth)
            shape = AttentionShape(queries, one, one.heads)
            for name, path in paths.items():
                check = path_check(gate, path)
                run = paged_call(q, history, cu, path, workspace, lookahead=lookahead)
                work = shape.work(history.stored_nbytes)
                yield System(name + about, run, work, check, history.sets, ours=not about)
                if not about:
                    yield System(name + SINGLE, _single_calls(q, history, queries, path, workspace), work, check)

    return make


def _single_calls(
    q: torch.Tensor, history: History, queries: int, path: AttentionPath, workspace: torch.Tensor
) -> Callable[[int], torch.Tensor]:
    calls = [
        paged_call(some, history, (0, queries), path, workspace, sub_table(history.table, b))
        for b, some in enumerate(q.split(queries))
    ]
    return lambda layer: torch.cat([call(layer) for call in calls])
