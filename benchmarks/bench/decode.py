"""Rows of decoding pages."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.encode import ENCODED, RELEASED
from bench.history import History, HistorySpec, thousands
from bench.released import ReleasedHistory, decode_gate
from bench.roofline import Work
from bench.rows import Case, Gate, System
from bench.settings import Bench
from qvg_paged.kernels import decode_layer, decode_pages
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["COPY", "OURS", "decode_cases"]

OURS, COPY = "ours", "copy of as many bytes"
DECODED = ENCODED
RELEASED_SETS = 3


def decode_cases(bench: Bench) -> Iterator[Case]:
    """Pages to BF16: K and V of a history, or its keys alone, turned to their positions."""
    if bench.is_small:
        shapes = [(HistorySpec((6,), 64, 2, 64, rope=rope)) for rope in (False, True)]
    else:
        sizes = ((18, 12),) if bench.options.quick else ((18, 12), (18, 40), (53, 40))
        shapes = [HistorySpec((frames,), 1560, heads, rope=rope) for frames, heads in sizes for rope in (False, True)]
        shapes += [] if bench.options.quick else [HistorySpec((18,), 1560, 12, format=name) for name in DECODED[1:]]
    for spec in shapes:
        what = "K, RoPE on read" if spec.rope else "K and V"
        about = {"keys": spec.keys, "heads": spec.heads, "head_dim": spec.head_dim, "format": spec.format,
                 "page_tokens": spec.tokens, "rope_on_read": spec.rope}  # fmt: skip
        bounds = () if spec.format != DECODED[0] else ("decode with RoPE",) if spec.rope else ("decode",)
        name = f"{what} of {thousands(spec.keys[0])} tokens, {spec.heads} heads, {spec.format}"
        yield Case("decode", name, about, _decoders(bench, spec), COPY, bounds)


def _decoders(bench: Bench, spec: HistorySpec) -> Callable[[], Iterator[System]]:
    def make() -> Iterator[System]:
        history = bench.history(spec)
        numbers = (0,) if spec.rope else (0, 1)
        shape = (spec.keys[0], spec.heads, spec.head_dim)
        outs = [torch.empty(shape, dtype=torch.bfloat16, device=bench.device) for _ in numbers]
        stored = history.stored_nbytes / (2 if spec.rope else 1)
        work = Work(0.0, stored + sum(out.numel() * 2 for out in outs))
        half = torch.empty(int(work.nbytes / 2), dtype=torch.uint8, device=bench.device)
        other = torch.empty_like(half)
        yield System(COPY, lambda _: other.copy_(half), work)
        yield System(
            OURS, _decoder(history, numbers, outs), work, _decode_check(history, numbers, outs), history.sets, ours=True
        )
        if bench.released is not None and not spec.rope and spec.format == "qvg-int2":
            yield _released_decoder(bench, spec)

    return make


def _decoder(history: History, numbers: tuple[int, ...], outs: list[torch.Tensor]) -> Callable[[int], None]:
    group = history.table.groups[0]
    rope = history.spec.rope_spec
    tables = None if rope is None else rope.tables(history.table.positions, history.device)

    def run(layer: int) -> None:
        if len(outs) == 2:
            decode_layer(
                history.buffer, group.pages, group.codebooks, history.layout, layer, *outs, rope=tables,
                rope_layout=RoPELayout.INTERLEAVED,
            )  # fmt: skip
            return
        part, offset, book_offset = history.parts(layer)[numbers[0]]
        decode_pages(
            history.buffer, group.pages, group.codebooks, part, offset, book_offset, *outs, rope=tables,
            rope_layout=RoPELayout.INTERLEAVED,
        )  # fmt: skip

    return run


def _decode_check(history: History, numbers: tuple[int, ...], outs: list[torch.Tensor]) -> Callable[[Any], Gate]:
    """First and last page against the PyTorch twin in float32: one rounding to BF16."""

    def check(_: None) -> Gate:
        worst = Gate(True, 0.0, float("inf"), "")
        tokens, pages = history.spec.tokens, history.spec.frames[0]
        for number, out in zip(numbers, outs, strict=True):
            for page in (0, pages - 1):
                twin = history.read(range(page, page + 1), number, 0, backend=Backend.TORCH, dtype=torch.float32)
                error = float((out[page * tokens : (page + 1) * tokens].float() - twin).abs().max())
                allowed = torch.finfo(torch.bfloat16).eps * float(twin.abs().max())
                if error / allowed >= worst.error / worst.allowed:
                    worst = Gate(error <= allowed, error, allowed, "PyTorch twin in float32")
        return worst

    return check


def _released_decoder(bench: Bench, spec: HistorySpec) -> System:
    assert bench.released is not None
    spans = [
        ReleasedHistory.random(bench.released, spec.keys, spec.heads, spec.head_dim, bench.device) for _ in range(3)
    ]
    work = Work(0.0, spans[0].nbytes + spec.dense_nbytes)
    state = spans[0].spans[0][0]
    return System(
        RELEASED, lambda number: spans[number].read(), work, lambda found: decode_gate(found[0], state), len(spans)
    )
