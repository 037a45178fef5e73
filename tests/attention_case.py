"""Random pools of encoded pages, block tables over them, and what the pages decode to."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tolerance import assert_as_good, assert_lse_as_good, exact_attention, torch_attention

from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.decode import decode_pages
from qvg_paged.kernels.encode import encode_part
from qvg_paged.kernels.formats import PageFormat
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

LAYER = 1
"""The layer that holds something, of two."""
POISON = 0xFF
"""As float8, float16, bfloat16 and float32 a not-a-number."""


@dataclass
class Case:
    """A poisoned pool, a table over it, and its decoded contents."""

    buffer: torch.Tensor
    table: BlockTable
    layouts: list[PageLayout]
    rope: RoPESpec | None

    def history(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (rotated if they are rotated on read) and values of one sequence in table order, float32."""
        keys, values = [], []
        for entry in self.table.entries(sequence):
            layout = self.layouts[self.table.formats[entry]]
            offsets = (layout.key_offset(LAYER), layout.key_codebook_offset(LAYER))
            key = self._decode(entry, layout.key, *offsets)
            keys.append(key if self.rope is None else self.rope.rotate(key, [self.table.positions[entry]]))
            offsets = (layout.value_offset(LAYER), layout.value_codebook_offset(LAYER))
            values.append(self._decode(entry, layout.value, *offsets))
        return torch.cat(keys), torch.cat(values)

    def _decode(self, entry: int, part: PartLayout, offset: int, book_offset: int) -> torch.Tensor:
        out = torch.empty((part.tokens, part.heads, part.head_dim), device=self.buffer.device)
        page, book = (
            torch.tensor([ids[entry]], dtype=torch.int32, device=self.buffer.device)
            for ids in (self.table.pages, self.table.codebooks)
        )
        decode_pages(self.buffer, page, book, part, offset, book_offset, out, backend=Backend.TORCH)
        return out

    def sequence(self, b: int) -> "Case":
        """The same pool with a table of one sequence."""
        some = slice(self.table.indptr[b], self.table.indptr[b + 1])
        table = BlockTable(
            pages=self.table.pages[some], codebooks=self.table.codebooks[some], formats=self.table.formats[some],
            positions=self.table.positions[some], indptr=(0, some.stop - some.start), device=self.table.device,
        )  # fmt: skip
        return Case(self.buffer, table, self.layouts, self.rope)

    def check(self, q: torch.Tensor, cu: Sequence[int], out: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """Every sequence is as good as PyTorch in q's dtype; sequences without pages are zero with lse -inf."""
        for b in range(self.table.batch):
            rows = slice(cu[b], cu[b + 1])
            if rows.start == rows.stop:
                continue
            if not self.table.entries(b):
                assert (out[rows] == 0).all()
                assert (lse[rows] == float("-inf")).all()
                continue
            k, v = self.history(b)
            exact, exact_lse = exact_attention(q[rows], k, v, scale)
            assert_as_good(out[rows], exact, torch_attention(q[rows], k, v, scale), exact_lse)
            assert_lse_as_good(lse[rows], exact_lse, q)


def build_case(
    formats: Sequence[PageFormat],
    sequences: Sequence[Sequence[int]],
    *,
    tokens: int,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    rope: RoPESpec | None = None,
    positions: Sequence[float] | None = None,
    device: str = "cpu",
    first_byte: int = 0,
) -> Case:
    """A pool with one page per entry of `sequences`, lists of indices into `formats`.

    Neighbouring pages of one quantised format are encoded together and share a codebook; channels differ in spread.
    """
    span = max((len(list(run)) for seq in sequences for _, run in groupby(seq)), default=1)
    layouts = [
        PageLayout.build(
            fmt, num_layers=2, tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype, span_tokens=span * tokens,
            split_pairs=rope is not None, key_pairing=RoPELayout.INTERLEAVED if rope is None else rope.layout,
        )
        for fmt in formats
    ]  # fmt: skip
    size = sum(layouts[i].page_nbytes + layouts[i].codebook_nbytes for seq in sequences for i in seq)
    buffer = torch.full((first_byte + size + 4 * GRANULE,), POISON, dtype=torch.uint8, device=device)
    free = first_byte + GRANULE
    pages: list[int] = []
    books: list[int] = []
    for seq in sequences:
        for fmt, run in groupby(seq):
            layout, count = layouts[fmt], len(list(run))
            book, free = free, free + layout.codebook_nbytes
            starts, free = [free + i * layout.page_nbytes for i in range(count)], free + count * layout.page_nbytes
            _encode(buffer, layout, starts, book)
            pages += [start // GRANULE for start in starts]
            books += [book // GRANULE if layout.codebook_nbytes else -1] * count
    total = len(pages)
    indptr = [0]
    for seq in sequences:
        indptr.append(indptr[-1] + len(seq))
    table = BlockTable(
        pages=tuple(pages), codebooks=tuple(books), formats=tuple(i for seq in sequences for i in seq),
        positions=tuple(map(float, positions or range(total))), indptr=tuple(indptr), device=buffer.device,
    )  # fmt: skip
    return Case(buffer, table, layouts, rope)


def _encode(buffer: torch.Tensor, layout: PageLayout, starts: list[int], book: int) -> None:
    for part, offset, book_offset in (
        (layout.key, layout.key_offset(LAYER), layout.key_codebook_offset(LAYER)),
        (layout.value, layout.value_offset(LAYER), layout.value_codebook_offset(LAYER)),
    ):
        spread = 0.25 + 4 * torch.rand(part.heads, part.head_dim) ** 4
        x = torch.randn(len(starts) * part.tokens, part.heads, part.head_dim) * spread
        x = x.to(device=buffer.device, dtype=part.dtype)
        keeps = bool(part.codebook_planes)
        encode_part(x, part, buffer, [s + offset for s in starts], book + book_offset if keeps else None)
