"""Rows of encoding a span and of decoding pages."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.history import ITERATIONS, History, HistorySpec, random_tokens, thousands
from bench.released import CONFIGURATIONS, ReleasedCodec, ReleasedHistory, decode_gate
from bench.roofline import Work
from bench.rows import Case, Gate, System
from bench.settings import Bench
from qvg_paged.kernels import EncodedSpan, PageLayout, PartLayout, decode_pages, decode_span, encode_part, encode_span
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.kernels.rope import RoPELayout

__all__ = ["COPY", "ENCODED", "OURS", "RELEASED", "decode_cases", "encode_cases"]

RELEASED, OURS, COPY = "released", "ours", "copy of as many bytes"
ENCODE_SETS = 3
ENCODED = ("qvg4-int2", "qvg-int2", "qvg-int4", "qvg-pro-int2")
DECODED = ENCODED
CHECKED_HEADS = 2
ERROR_FACTOR = 1.01
Pair = tuple[torch.Tensor, torch.Tensor]


def encode_cases(bench: Bench) -> Iterator[Case]:
    """K and V of a span, two iterations of k-means."""
    frames, tokens, heads = (4, 64, 2) if bench.is_small else (24, 1560, 12)
    dim = 64 if bench.is_small else 128
    about = {"heads": heads, "tokens": frames * tokens, "head_dim": dim, "iterations": ITERATIONS, "formats": ENCODED}
    yield Case(
        "encode", f"K and V of a span [{heads}, {frames * tokens:,}, {dim}]", about,
        lambda: _encoders(bench, frames, tokens, heads, dim), RELEASED if bench.released else ENCODED[0],
        ("encode", "encode, its format", "encode, error"),
    )  # fmt: skip


def _encoders(bench: Bench, frames: int, tokens: int, heads: int, dim: int) -> Iterator[System]:
    count = frames * tokens
    sets: list[Pair] = []
    for _ in range(ENCODE_SETS):
        sets.append((random_tokens(count, heads, dim, bench.device), random_tokens(count, heads, dim, bench.device)))
    read = 2 * count * heads * dim * 2
    for name in ENCODED[:2] if bench.options.quick else ENCODED:
        fmt = FORMATS[name].with_codecs(iterations=ITERATIONS)
        layout = PageLayout.build(
            fmt, num_layers=1, tokens=tokens, heads=heads, head_dim=dim, dtype=torch.bfloat16, span_tokens=count
        )
        spans = [_empty_span(part, frames, bench.device) for part in (layout.key, layout.value)]
        notes: dict[str, Any] = {}
        work = Work(_kmeans_flops(layout.key, count), read + sum(span.payload_nbytes for span in spans))
        yield System(
            name, _encoder(sets, spans), work, _encode_check(sets[0], spans, notes), ENCODE_SETS, wall=True, ours=True,
            notes=notes,
        )  # fmt: skip
    if bench.released is not None:
        yield _released_encoder(bench.released, sets, read)


def _empty_span(part: PartLayout, frames: int, device: torch.device) -> EncodedSpan:
    span = EncodedSpan(torch.empty(0, dtype=torch.uint8, device=device), part, frames)
    return replace(span, buffer=torch.zeros(span.part_offset(frames), dtype=torch.uint8, device=device))


def _encoder(sets: list[Pair], spans: list[EncodedSpan]) -> Callable[[int], None]:
    """Writes K and V of a set into `spans`, as the manager does per layer."""

    def run(number: int) -> None:
        for x, span in zip(sets[number], spans, strict=True):
            offsets = [span.part_offset(frame) for frame in range(span.frames)]
            encode_part(x, span.layout, span.buffer, offsets, 0 if span.layout.codebook_planes else None)

    return run


def _kmeans_flops(part: PartLayout, tokens: int) -> float:
    """Products of tokens with centroids, K and V."""
    codec = part.codec
    return 2 * 2.0 * codec.iterations * codec.stages * tokens * part.num_centroids * part.head_dim * part.heads


def _relative_error(x: torch.Tensor, read: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was stored."""
    return float((x.float() - read.float()).norm() / x.float().norm())


def _encode_check(pair: Pair, spans: list[EncodedSpan], notes: dict[str, Any]) -> Callable[[Any], Gate]:
    """Errors of what was written are those of the PyTorch twin, on two heads; all heads' go to the notes."""

    def check(_: None) -> Gate:
        worst = Gate(True, 0.0, float("inf"), "")
        read = [decode_span(span, torch.bfloat16) for span in spans]
        for x, span, decoded in zip(pair, spans, read, strict=True):
            some = x[:, :CHECKED_HEADS]
            twin = encode_span(
                some, span.layout.codec, tokens_per_frame=span.layout.tokens, pairing=span.layout.pairing,
                backend=Backend.TORCH,
            )  # fmt: skip
            allowed = ERROR_FACTOR * _relative_error(some, decode_span(twin, torch.float32, backend=Backend.TORCH))
            error = _relative_error(some, decoded[:, :CHECKED_HEADS])
            if error / allowed >= worst.error / worst.allowed:
                worst = Gate(error <= allowed, error, allowed, "PyTorch twin's error")
        notes["relative_error"] = sum(_relative_error(x, y) for x, y in zip(pair, read, strict=True)) / 2
        return worst

    return check


def _released_encoder(released: ReleasedCodec, sets: list[Pair], read: int) -> System:
    """The released encoder on the same tokens in the order it wants; it waits for the device on the way."""
    heads_first = [tuple(x.transpose(0, 1)[None].contiguous() for x in pair) for pair in sets]
    notes: dict[str, Any] = {"configurations_tuned": CONFIGURATIONS}

    def check(states: tuple[dict[str, Any], dict[str, Any]]) -> Gate:
        found = released.decode(*states)
        errors = [_relative_error(x, y) for x, y in zip(heads_first[0], found, strict=True)]
        notes["relative_error"] = sum(errors) / 2
        return decode_gate(found[0], states[0])

    return System(
        RELEASED, lambda number: released.encode(*heads_first[number]), Work(0.0, read), check, ENCODE_SETS, wall=True,
        notes=notes,
    )  # fmt: skip


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
        for number, out in zip(numbers, outs, strict=True):
            part, offset, book_offset = history.parts(layer)[number]
            decode_pages(
                history.buffer, group.pages, group.codebooks, part, offset, book_offset, out,
                rope=tables if number == 0 else None, rope_layout=RoPELayout.INTERLEAVED,
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
