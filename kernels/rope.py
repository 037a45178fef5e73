"""Rotary position embedding of video tokens: where a token sits (frame, row, column) and how its channels turn.

The channels of a head are split over the three axes as Wan does (frame gets what is left of head_dim after two
thirds); pair j of an axis with m pairs turns by ``position * base ** (-j / m)``.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from qvg_paged.kernels.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["RoPELayout", "RoPESpec", "RoPETables", "rotate"]


class RoPELayout(Enum):
    """Which two channels form a pair."""

    INTERLEAVED = "interleaved"
    """Channels 2j and 2j + 1 (Wan, Self-Forcing, LongCat)."""
    HALF_SPLIT = "half-split"
    """Channels j and j + head_dim / 2."""


@dataclass(frozen=True)
class RoPETables:
    """Cosines and sines, apart for the frame axis and the two axes inside a frame.

    Attributes:
        cos_frame, sin_frame: ``[frames, frame_pairs]`` float32.
        cos_space, sin_space: ``[tokens_per_frame, space_pairs]`` float32; rows first, then columns.
    """

    cos_frame: torch.Tensor
    sin_frame: torch.Tensor
    cos_space: torch.Tensor
    sin_space: torch.Tensor

    @cached_property
    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The tables of `wide` in float16."""
        return tuple(table.half() for table in self.wide)  # type: ignore[return-value]

    @cached_property
    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tables over all pairs, float32: cosines 1 and sines 0 where the other axis turns.

        Products of cosines and sums of sines are those of every token, exactly.
        """
        pairs = (self.cos_frame.shape[1], self.cos_space.shape[1])
        after, before = (0, pairs[1]), (pairs[0], 0)
        return (
            functional.pad(self.cos_frame, after, value=1.0), functional.pad(self.sin_frame, after, value=0.0),
            functional.pad(self.cos_space, before, value=1.0), functional.pad(self.sin_space, before, value=0.0),
        )  # fmt: skip

    def of_frames(self, rows: torch.Tensor | slice) -> "RoPETables":
        """Those of some of the frames; what all frames have in common is shared."""
        part = RoPETables(self.cos_frame[rows], self.sin_frame[rows], self.cos_space, self.sin_space)
        cos, sin, *space = self.wide
        part.__dict__["wide"] = (cos[rows], sin[rows], *space)
        return part

    def expand(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of every token, each ``[frames * tokens_per_frame, head_dim / 2]`` float32."""
        frames, tokens = len(self.cos_frame), len(self.cos_space)

        def table(frame: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
            parts = [frame[:, None].expand(-1, tokens, -1), space[None].expand(frames, -1, -1)]
            return torch.cat(parts, -1).flatten(0, 1)

        return table(self.cos_frame, self.cos_space), table(self.sin_frame, self.sin_space)


@dataclass(frozen=True, kw_only=True)
class RoPESpec:
    """Rotary embedding of a model's keys and queries.

    Attributes:
        head_dim: channels per head.
        grid: rows and columns of tokens in a frame, raster order.
        layout: how channels pair up.
        pairs: pairs of the frame, row and column axes; None splits head_dim / 2 as Wan does.
        bases: base of each axis.
    """

    head_dim: int
    grid: tuple[int, int]
    layout: RoPELayout = RoPELayout.INTERLEAVED
    pairs: tuple[int, int, int] | None = None
    bases: tuple[float, float, float] = (10000.0, 10000.0, 10000.0)

    def __post_init__(self) -> None:
        if self.pairs is None:
            third = self.head_dim // 2 // 3
            object.__setattr__(self, "pairs", (self.head_dim // 2 - 2 * third, third, third))
        assert self.pairs is not None
        if sum(self.pairs) * 2 != self.head_dim:
            raise ArgumentError(f"pairs: expected a sum of head_dim / 2 = {self.head_dim // 2}, got {self.pairs}")
        if min(self.grid) < 1:
            raise ArgumentError(f"grid: expected positive rows and columns, got {self.grid}")

    @property
    def tokens_per_frame(self) -> int:
        """Rows times columns."""
        return self.grid[0] * self.grid[1]

    def tables(self, frames: "Sequence[float] | torch.Tensor", device: torch.device | str = "cpu") -> RoPETables:
        """Tables for the given frame positions, computed in float64."""
        frame = self._angles(0, torch.as_tensor(frames, dtype=torch.float64))
        cos_frame, sin_frame = (x.float().to(device, non_blocking=True) for x in (frame.cos(), frame.sin()))
        return RoPETables(cos_frame, sin_frame, *_space_tables(self, torch.device(device)))

    def _angles(self, axis: int, position: torch.Tensor) -> torch.Tensor:
        """By how much each pair of an axis turns at some positions along it."""
        assert self.pairs is not None
        count = self.pairs[axis]
        return position[:, None] * self.bases[axis] ** (-torch.arange(count, dtype=torch.float64) / max(count, 1))

    def rotate(self, x: torch.Tensor, frames: "Sequence[float] | torch.Tensor") -> torch.Tensor:
        """`x` ``[len(frames) * tokens_per_frame, heads, head_dim]`` turned to the given frame positions."""
        return rotate(x, *self.tables(frames, x.device).expand(), self.layout)


@lru_cache(maxsize=16)
def _space_tables(spec: RoPESpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the axes inside a frame, the same for all frames."""
    columns = spec.grid[1]
    raster = torch.arange(spec.tokens_per_frame, dtype=torch.float64)
    angles = torch.cat([spec._angles(1, raster // columns), spec._angles(2, raster % columns)], -1)
    cos, sin = (x.float().to(device) for x in (angles.cos(), angles.sin()))
    return cos, sin


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: RoPELayout) -> torch.Tensor:
    """`x` ``[tokens, heads, head_dim]`` turned by `cos`, `sin` ``[tokens, head_dim / 2]``, in float32, in x's dtype."""
    cos, sin = cos[:, None], sin[:, None]
    wide = x.float()
    if layout is RoPELayout.INTERLEAVED:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return turned.to(x.dtype)
