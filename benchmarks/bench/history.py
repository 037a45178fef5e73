"""Histories to attend to: random tokens encoded into a pool of pages, and the same history unquantised.

Each input set is a layer of the pool, with other tokens.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from qvg_paged.kernels import BlockTable, PageLayout, decode_pages, encode_part
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.formats import PageFormat, get_format
from qvg_paged.kernels.layout import GRANULE, PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = [
    "ITERATIONS",
    "SPAN_FRAMES",
    "History",
    "HistorySpec",
    "random_tokens",
    "sub_table",
    "thousands",
    "video_grid",
]

SPAN_FRAMES = 24
ITERATIONS = 2
CACHED_NBYTES = 120 << 20
"""Input sets together exceed this, where several are affordable: more than twice the L2 cache of an H200."""
MAX_SETS = 5
PROTOTYPES = 64


def video_grid(tokens: int) -> tuple[int, int]:
    """Rows and columns of a frame of `tokens` tokens, as square as possible: 30 x 52 for 1,560."""
    rows = max(rows for rows in range(1, int(tokens**0.5) + 1) if tokens % rows == 0)
    return rows, tokens // rows


def thousands(count: int) -> str:
    """``28k`` for 28,080."""
    return f"{count // 1000}k" if count >= 10000 else f"{count:,}"


def random_tokens(tokens: int, heads: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """``[tokens, heads, head_dim]`` BF16 that k-means can work with: noise around prototypes, channels that differ."""
    spread = 0.5 + 2 * torch.rand(heads, head_dim, device=device) ** 4
    centres = torch.randn(PROTOTYPES, heads, head_dim, device=device)
    owner = torch.randint(0, PROTOTYPES, (tokens,), device=device)
    x = torch.randn(tokens, heads, head_dim, device=device, dtype=torch.bfloat16).mul_(0.5)
    return x.add_(centres.bfloat16()[owner]).mul_(spread.bfloat16())


@dataclass(frozen=True)
class HistorySpec:
    """Shape of a history.

    Attributes:
        frames: pages of each sequence.
        tokens: tokens of a page.
        heads: KV heads.
        head_dim: channels per head.
        format: name of the pages' format.
        rope: keys are stored unrotated and turned when read.
    """

    frames: tuple[int, ...]
    tokens: int
    heads: int
    head_dim: int = 128
    format: str = "qvg4-int2"
    rope: bool = False

    @property
    def keys(self) -> list[int]:
        """Keys of each sequence."""
        return [frames * self.tokens for frames in self.frames]

    @property
    def rope_spec(self) -> RoPESpec | None:
        """How keys are turned, or None."""
        return RoPESpec(head_dim=self.head_dim, grid=video_grid(self.tokens)) if self.rope else None

    @property
    def dense_nbytes(self) -> int:
        """K and V of one set in BF16."""
        return 2 * 2 * sum(self.keys) * self.heads * self.head_dim

    def layout(self, num_layers: int) -> PageLayout:
        """Page layout of the format with spans of up to 24 frames and two iterations of k-means."""
        fmt: PageFormat = get_format(self.format)
        return PageLayout.build(
            fmt if fmt.is_dense else fmt.with_codecs(iterations=ITERATIONS), num_layers=num_layers, tokens=self.tokens,
            heads=self.heads, head_dim=self.head_dim, dtype=torch.bfloat16,
            span_tokens=min(SPAN_FRAMES, max(self.frames)) * self.tokens, split_pairs=self.rope,
        )  # fmt: skip


def sub_table(table: BlockTable, sequence: int) -> BlockTable:
    """A table of one sequence of `table`."""
    rows = table.entries(sequence)
    some = slice(rows.start, rows.stop)
    return BlockTable(
        pages=table.pages[some], codebooks=table.codebooks[some], formats=table.formats[some],
        positions=table.positions[some], indptr=(0, len(rows)), device=table.device,
    )  # fmt: skip


@dataclass
class History:
    """An empty pool for a `HistorySpec`; `filled` and `dense_pages` make histories.

    Attributes:
        spec, device: as given.
        sets: input sets; set i is layer i.
        layout: of the pages.
        table: all sequences.
        buffer: the pool.
    """

    spec: HistorySpec
    device: torch.device
    sets: int
    layout: PageLayout = field(init=False)
    table: BlockTable = field(init=False)
    buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.spec.layout(self.sets)
        free, pages, books, indptr = 1, [], [], [0]
        self._spans: list[tuple[list[int], int]] = []
        self._truths: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}
        book_units, page_units = (n // GRANULE for n in (self.layout.codebook_nbytes, self.layout.page_nbytes))
        for frames in self.spec.frames:
            for start in range(0, frames, SPAN_FRAMES):
                count = min(SPAN_FRAMES, frames - start)
                book, free = free, free + book_units
                span, free = [free + i * page_units for i in range(count)], free + count * page_units
                self._spans.append((span, book))
                pages += span
                books += [book if book_units else -1] * count
            indptr.append(len(pages))
        self.buffer = torch.zeros(free * GRANULE, dtype=torch.uint8, device=self.device)
        positions = tuple(float(i) for frames in self.spec.frames for i in range(frames))
        self.table = BlockTable(
            pages=tuple(pages), codebooks=tuple(books), formats=(0,) * len(pages), positions=positions,
            indptr=tuple(indptr), device=self.device,
        )  # fmt: skip

    @classmethod
    def filled(cls, spec: HistorySpec, device: torch.device) -> "History":
        """Random tokens, encoded; several sets where one would fit the caches."""
        stored = sum(spec.frames) * spec.layout(1).page_nbytes
        sets = max(1, min(MAX_SETS, -(-CACHED_NBYTES // stored))) if device.type == "cuda" else 1
        made = cls(spec, device, sets)
        for layer in range(sets):
            for pages, book in made._spans:
                for part, offset, book_offset in made.parts(layer):
                    x = random_tokens(len(pages) * part.tokens, part.heads, part.head_dim, device)
                    where = book * GRANULE + book_offset if part.codebook_planes else None
                    encode_part(x, part, made.buffer, [page * GRANULE + offset for page in pages], where)
        return made

    def dense_pages(self) -> "History":
        """The same values in unquantised pages; keys are turned already."""
        other = History(replace(self.spec, format="dense", rope=False), self.device, self.sets)
        for layer in range(self.sets):
            for number, (part, offset, _) in enumerate(other.parts(layer)):
                for sequence in range(self.table.batch):
                    entries = self.table.entries(sequence)
                    x = self.read(entries, number, layer, backend=Backend.AUTO, dtype=torch.bfloat16)
                    pages = other.table.pages[entries.start : entries.stop]
                    encode_part(x, part, other.buffer, [page * GRANULE + offset for page in pages], None)
        return other

    def parts(self, layer: int) -> list[tuple[PartLayout, int, int]]:
        """Part, its byte in a page and in a codebook: of K, then of V."""
        at = self.layout
        return [
            (at.key, at.key_offset(layer), at.key_codebook_offset(layer)),
            (at.value, at.value_offset(layer), at.value_codebook_offset(layer)),
        ]

    @property
    def stored_nbytes(self) -> int:
        """Payload of one set: pages and codebooks."""
        parts = (self.layout.key, self.layout.value)
        pages = sum(self.spec.frames) * sum(part.payload_nbytes for part in parts)
        return pages + len(self._spans) * sum(part.codebook_payload_nbytes for part in parts)

    def read(self, entries: range, number: int, layer: int, *, backend: Backend, dtype: torch.dtype) -> torch.Tensor:
        """K (`number` 0, turned if it is turned on read) or V (1) of table entries, ``[keys, heads, head_dim]``."""
        part, offset, book_offset = self.parts(layer)[number]
        some = slice(entries.start, entries.stop)
        pages, books = (
            torch.tensor(ids[some], dtype=torch.int32, device=self.device)
            for ids in (self.table.pages, self.table.codebooks)
        )
        out = torch.empty((len(entries) * part.tokens, part.heads, part.head_dim), dtype=dtype, device=self.device)
        rope = self.spec.rope_spec if number == 0 else None
        tables = None if rope is None else rope.tables(self.table.positions[some], self.device)
        decode_pages(
            self.buffer, pages, books, part, offset, book_offset, out, rope=tables,
            rope_layout=RoPELayout.INTERLEAVED, backend=backend,
        )  # fmt: skip
        return out

    def truth(self, sequence: int, heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some heads of set 0 as the PyTorch twin reads them, ``[keys, len(heads), head_dim]`` float32."""
        key = (sequence, tuple(heads))
        if key not in self._truths:
            self._truths[key] = (self._twin(sequence, heads, 0), self._twin(sequence, heads, 1))
        return self._truths[key]

    def _twin(self, sequence: int, heads: list[int], number: int) -> torch.Tensor:
        pages = [range(entry, entry + 1) for entry in self.table.entries(sequence)]
        read = (self.read(page, number, 0, backend=Backend.TORCH, dtype=torch.float32) for page in pages)
        return torch.cat([x[:, heads] for x in read])

    @cached_property
    def dense(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each set decoded to BF16, ``[batch, heads, keys, head_dim]`` contiguous; sequences are equal."""
        return [(self._stacked(0, layer), self._stacked(1, layer)) for layer in range(self.sets)]

    def _stacked(self, number: int, layer: int) -> torch.Tensor:
        size = (self.table.batch, self.spec.heads, self.spec.keys[0], self.spec.head_dim)
        out = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        for sequence in range(self.table.batch):
            entries = self.table.entries(sequence)
            x = self.read(entries, number, layer, backend=Backend.AUTO, dtype=torch.bfloat16)
            out[sequence].copy_(x.transpose(0, 1))
        return out
