"""Rows of encoding a span: what the manager does per layer when a span closes."""

from collections.abc import Iterator
from typing import Any

import torch

from bench.history import ITERATIONS, random_tokens
from bench.released import CONFIGURATIONS, ReleasedCodec, decode_gate
from bench.roofline import Work
from bench.rows import Case, Gate, System
from bench.settings import Bench
from qvg_paged.encoder import SpanEncoder
from qvg_paged.kernels import PageLayout, PartLayout, decode_pages, decode_span, encode_part, encode_span
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.formats import DENSE, FORMATS
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.page import QUANTISED_FORMAT, Codebook, Page
from qvg_paged.pool import Slot
from qvg_paged.slabs import PLACE

__all__ = ["ENCODED", "RELEASED", "encode_cases"]

RELEASED = "released"
SETS = 3
ENCODED = ("qvg4-int2", "qvg-int2", "qvg-int4", "qvg-pro-int2", "best-2bit", "balanced", "near-lossless")
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
        ("encode", "encode, its format", "encode, error", "presets, encode"),
    )  # fmt: skip


def _encoders(bench: Bench, frames: int, tokens: int, heads: int, dim: int) -> Iterator[System]:
    size = (frames * tokens, heads, dim)
    sets: list[Pair] = [(random_tokens(*size, bench.device), random_tokens(*size, bench.device)) for _ in range(SETS)]
    read = sum(x.numel() * x.element_size() for x in sets[0])
    for name in ENCODED[:2] if bench.options.quick else ENCODED:
        span = _Span(sets, name, frames)
        work = Work(_kmeans_flops(span.target.key, size[0]), read + span.stored_nbytes)
        yield System(name, span.encode, work, span.check, SETS, wall=True, ours=True, notes=span.notes)
    if bench.released is not None:
        yield _released_encoder(bench.released, sets, read)


class _Span:
    """Pages of a model with one layer: unquantised ones for every input set, quantised ones that all are encoded to.

    Attributes:
        target: layout of the quantised pages.
        notes: relative error of what was encoded, once it was checked.
    """

    def __init__(self, sets: list[Pair], name: str, frames: int) -> None:
        tokens, (heads, dim), self._device = len(sets[0][0]) // frames, sets[0][0].shape[1:], sets[0][0].device
        source, self.target = (
            PageLayout.build(
                fmt, num_layers=1, tokens=tokens, heads=heads, head_dim=dim, dtype=torch.bfloat16,
                span_tokens=frames * tokens,
            )
            for fmt in (DENSE, FORMATS[name].with_codecs(iterations=ITERATIONS))
        )  # fmt: skip
        self._sets, self._free, self.notes = sets, GRANULE, dict[str, Any]()
        book = Codebook.at(self._take(self.target.codebook_nbytes), frames) if self.target.codebook_nbytes else None
        self._quantised = [Page.at(self._take(self.target.page_nbytes), QUANTISED_FORMAT, book) for _ in range(frames)]
        self._dense = [[Page.at(self._take(source.page_nbytes), 0) for _ in range(frames)] for _ in sets]
        self._buffer = torch.zeros(self._free, dtype=torch.uint8, device=self._device)
        for pair, pages in zip(sets, self._dense, strict=True):
            for x, part, start in zip(pair, (source.key, source.value), (0, source.value_offset(0)), strict=True):
                encode_part(x, part, self._buffer, [page.id * GRANULE + start for page in pages], None)
        self._encoder = SpanEncoder(self._buffer, (source, self.target))

    def _take(self, nbytes: int) -> Slot:
        start, self._free = self._free, self._free + nbytes
        return Slot(start // GRANULE, nbytes, "bench", start // GRANULE << PLACE)

    @property
    def stored_nbytes(self) -> int:
        """Payload of the span."""
        return len(self._quantised) * self.target.page_payload_nbytes + self.target.codebook_payload_nbytes

    def encode(self, number: int) -> None:
        """Encode an input set, as a commit does."""
        self._encoder.encode(self._dense[number], self._quantised)

    def _read(self, part: PartLayout, offset: int, book_offset: int) -> torch.Tensor:
        ids = [page.id for page in self._quantised], [page.codebook_id for page in self._quantised]
        pages, books = (torch.tensor(units, dtype=torch.int32, device=self._device) for units in ids)
        shape = (len(pages) * part.tokens, part.heads, part.head_dim)
        out = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        decode_pages(self._buffer, pages, books, part, offset, book_offset, out)
        return out

    def check(self, _: None) -> Gate:
        """Set 0 was stored with the error of the PyTorch twin, on two heads; the error of all heads is noted."""
        self._encoder.order_after()
        at, worst, errors = self.target, Gate(True, 0.0, float("inf"), ""), []
        places = (
            (at.key, at.key_offset(0), at.key_codebook_offset(0)),
            (at.value, at.value_offset(0), at.value_codebook_offset(0)),
        )
        for x, (part, *offsets) in zip(self._sets[0], places, strict=True):
            read, some = self._read(part, *offsets), x[:, :CHECKED_HEADS]
            twin = encode_span(
                some, part.codec, tokens_per_frame=part.tokens, pairing=part.pairing, backend=Backend.TORCH
            )
            allowed = ERROR_FACTOR * _relative_error(some, decode_span(twin, torch.float32, backend=Backend.TORCH))
            error = _relative_error(some, read[:, :CHECKED_HEADS])
            errors.append(_relative_error(x, read))
            if error / allowed >= worst.error / worst.allowed:
                worst = Gate(error <= allowed, error, allowed, "PyTorch twin's error")
        self.notes["relative_error"] = sum(errors) / 2
        return worst


def _kmeans_flops(part: PartLayout, tokens: int) -> float:
    """Products of tokens with centroids, K and V."""
    codec = part.codec
    return 2 * 2.0 * codec.iterations * codec.stages * tokens * part.num_centroids * part.head_dim * part.heads


def _relative_error(x: torch.Tensor, read: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was stored."""
    return float((x.float() - read.float()).norm() / x.float().norm())


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
        RELEASED, lambda number: released.encode(*heads_first[number]), Work(0.0, read), check, SETS, wall=True,
        notes=notes,
    )  # fmt: skip
