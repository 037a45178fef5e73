"""Where every byte of a page and of a codebook lies. A leaf module; docs/kv_layout.md draws what it computes.

A page holds one frame of one stream in one format, all layers:

    page      [layer][K part | V part]
    part      planes `codes`, `scales`, `ids` (quantised) or `values` (dense), each 16-byte aligned
    codes     [heads, rows, head_dim] uint8, token-strided: see `code_position`
    scales    [heads, head_dim / block_size, tokens] float8_e4m3fn
    ids       [heads, stages, tokens] uint8
    values    [tokens, heads, head_dim] in the model's dtype

A codebook serves all pages of a span: [layer][K part | V part], a part being

    centroids [stages, heads, num_centroids, head_dim] bfloat16 or float8_e4m3fn
    centroid_scales [stages, heads] float32 (FP8 centroids only)
    balance   [heads, head_dim] bfloat16 (balanced codecs only)

Channels of `codes`, `centroids` and `balance` come in stored order (`PartLayout.channel_order`); the blocks of `scales`
count natural channels. Bytes between planes and after the last token are zero.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import MAX_CENTROIDS, CentroidType, Codec, PageFormat
from qvg_paged.kernels.rope import RoPELayout

__all__ = [
    "GRANULE",
    "LAYOUT_VERSION",
    "TILE_TOKENS",
    "PageLayout",
    "PartLayout",
    "Plane",
    "align",
    "code_position",
    "code_rows",
]

LAYOUT_VERSION = 1
GRANULE = 256
"""Bytes per unit of a page id: a page with id `i` starts at byte ``GRANULE * i`` of the pool."""
TILE_TOKENS = 256
PLANE_ALIGNMENT = 16


def align(nbytes: int, alignment: int) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-nbytes // alignment) * alignment


def code_rows(tokens: int, bits: int) -> int:
    """Rows of the `codes` plane for `tokens` tokens of `bits`-bit codes."""
    full, rest = divmod(tokens, TILE_TOKENS)
    per_byte = 8 // bits
    return full * (TILE_TOKENS // per_byte) + -(-rest // per_byte)


def code_position(tokens: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and bit shift of each token's codes, both ``[tokens]`` int64.

    Tokens come in tiles of 256. In a tile of n tokens with ``stride = ceil(n * bits / 8)`` rows, token t sits in row
    ``t % stride`` at bit ``bits * (t // stride)``: one row of bytes holds the same channels of tokens `stride` apart,
    so that a block of rows unpacks to whole sub-tiles of tokens with the channels contiguous.
    """
    per_byte = 8 // bits
    token = torch.arange(tokens)
    tile, inside = token // TILE_TOKENS, token % TILE_TOKENS
    in_tile = (tokens - tile * TILE_TOKENS).clamp(max=TILE_TOKENS)
    stride = (in_tile + per_byte - 1) // per_byte
    return tile * (TILE_TOKENS // per_byte) + inside % stride, bits * (inside // stride)


@dataclass(frozen=True)
class Plane:
    """A typed array at a byte offset inside a part."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the array itself, padding excluded."""
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count

    def view(self, buffer: torch.Tensor, part_offset: int) -> torch.Tensor:
        """The array inside `buffer` (1-D uint8), writable, for a part that starts at byte `part_offset`."""
        start = part_offset + self.offset
        return buffer[start : start + self.nbytes].view(self.dtype).view(self.shape)


def _place(specs: list[tuple[str, tuple[int, ...], torch.dtype]]) -> tuple[Plane, ...]:
    planes, offset = [], 0
    for name, shape, dtype in specs:
        plane = Plane(name, offset, shape, dtype)
        planes.append(plane)
        offset = align(offset + plane.nbytes, PLANE_ALIGNMENT)
    return tuple(planes)


def _total(planes: tuple[Plane, ...]) -> int:
    return align(planes[-1].offset + planes[-1].nbytes, PLANE_ALIGNMENT) if planes else 0


@dataclass(frozen=True, kw_only=True)
class PartLayout:
    """Planes of one tensor (K or V) of one layer, in a page and in a span's codebook.

    Attributes:
        codec: how the tensor is stored.
        tokens: tokens per frame.
        heads: KV heads.
        head_dim: channels per head.
        dtype: the model's dtype (dense values).
        num_centroids: centroids per stage and head; 0 without stages.
        split_pairs: channels are stored as all even ones, then all odd ones, so that a reader rotates interleaved
            RoPE pairs with two elementwise products of half tiles. Blocks of a scale count channels before this.
        pairing: which channels share a balancing factor (keys: their RoPE pair); None gives each its own.
    """

    codec: Codec
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    num_centroids: int
    split_pairs: bool = False
    pairing: RoPELayout | None = None

    def __post_init__(self) -> None:
        if min(self.tokens, self.heads) < 1 or self.head_dim < 2 or self.head_dim % 2:
            raise ArgumentError(
                "tokens, heads, head_dim: expected positive sizes and an even head_dim, "
                f"got {self.tokens}, {self.heads}, {self.head_dim}"
            )
        if not self.codec.is_dense and self.codec.stages and not 1 <= self.num_centroids <= MAX_CENTROIDS:
            raise ArgumentError(f"num_centroids: expected 1 to {MAX_CENTROIDS}, got {self.num_centroids}")
        if not self.codec.is_dense and self.head_dim % self.codec.block_size:
            raise ArgumentError(
                f"block_size: expected a divisor of head_dim={self.head_dim}, got {self.codec.block_size}"
            )

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """Planes of the part inside a page."""
        codec, tokens, heads, dim = self.codec, self.tokens, self.heads, self.head_dim
        if codec.is_dense:
            return _place([("values", (tokens, heads, dim), self.dtype)])
        specs: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("codes", (heads, code_rows(tokens, codec.grid.bits), dim), torch.uint8),
            ("scales", (heads, dim // codec.block_size, tokens), torch.float8_e4m3fn),
        ]
        if codec.stages:
            specs.append(("ids", (heads, codec.stages, tokens), torch.uint8))
        return _place(specs)

    @cached_property
    def codebook_planes(self) -> tuple[Plane, ...]:
        """Planes of the part inside a codebook; empty if the codec keeps nothing per span."""
        codec, heads, dim = self.codec, self.heads, self.head_dim
        specs: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        if not codec.is_dense and codec.stages:
            fp8 = codec.centroid_type is CentroidType.FP8
            dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
            specs.append(("centroids", (codec.stages, heads, self.num_centroids, dim), dtype))
            if fp8:
                specs.append(("centroid_scales", (codec.stages, heads), torch.float32))
        if not codec.is_dense and codec.balanced:
            specs.append(("balance", (heads, dim), torch.bfloat16))
        return _place(specs)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the part in a page, padding included."""
        return _total(self.planes)

    @cached_property
    def codebook_nbytes(self) -> int:
        """Bytes of the part in a codebook, padding included."""
        return _total(self.codebook_planes)

    @cached_property
    def payload_nbytes(self) -> int:
        """Bytes of the part's planes in a page, padding excluded."""
        return sum(plane.nbytes for plane in self.planes)

    @cached_property
    def codebook_payload_nbytes(self) -> int:
        """Bytes of the part's planes in a codebook, padding excluded."""
        return sum(plane.nbytes for plane in self.codebook_planes)

    def plane(self, name: str) -> Plane:
        """Plane of that name, in the page or in the codebook."""
        for plane in self.planes + self.codebook_planes:
            if plane.name == name:
                return plane
        raise ArgumentError(
            f"plane: expected one of {[p.name for p in self.planes + self.codebook_planes]}, got {name!r}"
        )

    @cached_property
    def channel_order(self) -> torch.Tensor:
        """Natural channel of each stored channel, ``[head_dim]`` int64."""
        natural = torch.arange(self.head_dim)
        return torch.cat([natural[0::2], natural[1::2]]) if self.split_pairs else natural


@dataclass(frozen=True, kw_only=True)
class PageLayout:
    """Bytes of a page, and of the codebook of its span, in one format.

    Attributes:
        format: codecs of K and V.
        num_layers: layers of the model.
        key: part of K; the same in every layer.
        value: part of V.
        version: changes whenever a byte moves.
    """

    format: PageFormat
    num_layers: int
    key: PartLayout
    value: PartLayout
    version: int = LAYOUT_VERSION

    @classmethod
    def build(
        cls,
        fmt: PageFormat,
        *,
        num_layers: int,
        tokens: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        span_tokens: int,
        split_pairs: bool = False,
        key_pairing: RoPELayout = RoPELayout.INTERLEAVED,
    ) -> "PageLayout":
        """Layout of `fmt` for frames of `tokens` tokens and spans of `span_tokens`.

        Args:
            fmt: codecs of K and V.
            num_layers: layers of the model.
            tokens: tokens per frame.
            heads: KV heads.
            head_dim: channels per head.
            dtype: the model's dtype.
            span_tokens: tokens that share a codebook.
            split_pairs: keys are rotated when read: store their even channels before their odd ones. Half-split
                pairs are apart already and stay in natural order.
            key_pairing: RoPE pairs of the keys.
        """

        def part(codec: Codec, split: bool, pairing: RoPELayout | None) -> PartLayout:
            return PartLayout(
                codec=codec.fitted(head_dim), tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype,
                num_centroids=codec.centroids_for(span_tokens), split_pairs=split and not codec.is_dense,
                pairing=pairing,
            )  # fmt: skip

        split = split_pairs and key_pairing is RoPELayout.INTERLEAVED
        key, value = part(fmt.key, split, key_pairing), part(fmt.value, False, None)
        return cls(format=fmt, num_layers=num_layers, key=key, value=value)

    @cached_property
    def layer_nbytes(self) -> int:
        """Bytes from one layer to the next inside a page."""
        return self.key.nbytes + self.value.nbytes

    @cached_property
    def codebook_layer_nbytes(self) -> int:
        """Bytes from one layer to the next inside a codebook."""
        return self.key.codebook_nbytes + self.value.codebook_nbytes

    @cached_property
    def page_nbytes(self) -> int:
        """Bytes of a page, a multiple of `GRANULE`."""
        return align(self.num_layers * self.layer_nbytes, GRANULE)

    @cached_property
    def codebook_nbytes(self) -> int:
        """Bytes of a codebook, a multiple of `GRANULE`; 0 if the format keeps nothing per span."""
        return align(self.num_layers * self.codebook_layer_nbytes, GRANULE)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether K and V go in the same launches: they differ in channel order and pairing at most."""
        key, value = (
            replace(part, split_pairs=False, pairing=None, codec=replace(part.codec, num_centroids=None,
                                                                        tokens_per_centroid=None))
            for part in (self.key, self.value)
        )  # fmt: skip
        return key == value  # as many centroids, whatever rule says so

    @property
    def page_payload_nbytes(self) -> int:
        """Bytes of the planes of a page, padding excluded."""
        return self.num_layers * (self.key.payload_nbytes + self.value.payload_nbytes)

    @property
    def codebook_payload_nbytes(self) -> int:
        """Bytes of the planes of a codebook, padding excluded."""
        return self.num_layers * (self.key.codebook_payload_nbytes + self.value.codebook_payload_nbytes)

    def key_offset(self, layer: int) -> int:
        """Byte of a page at which the K part of `layer` starts."""
        return layer * self.layer_nbytes

    def value_offset(self, layer: int) -> int:
        """Byte of a page at which the V part of `layer` starts."""
        return layer * self.layer_nbytes + self.key.nbytes

    def key_codebook_offset(self, layer: int) -> int:
        """Byte of a codebook at which the K part of `layer` starts."""
        return layer * self.codebook_layer_nbytes

    def value_codebook_offset(self, layer: int) -> int:
        """Byte of a codebook at which the V part of `layer` starts."""
        return layer * self.codebook_layer_nbytes + self.key.codebook_nbytes
