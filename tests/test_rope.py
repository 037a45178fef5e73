"""Rotary embedding: what it keeps, what it depends on, and the two ways of pairing channels."""

import pytest
import torch

from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.rope import RoPELayout, RoPESpec, rotate


def as_complex(x: torch.Tensor, layout: RoPELayout) -> torch.Tensor:
    half = x.shape[-1] // 2
    parts = (x[..., 0::2], x[..., 1::2]) if layout is RoPELayout.INTERLEAVED else (x[..., :half], x[..., half:])
    return torch.complex(*(part.double() for part in parts))


@pytest.mark.parametrize("layout", RoPELayout)
def test_rotation_is_a_complex_product_with_the_angles_of_the_three_axes(layout: RoPELayout) -> None:
    spec = RoPESpec(head_dim=64, grid=(3, 5), layout=layout, bases=(10000.0, 500.0, 300.0))
    frames = torch.tensor([7.0, 0.0, 1200.0])
    x = torch.randn(3 * 15, 2, 64)
    token = torch.arange(45)
    position = torch.stack([frames[token // 15].double(), token % 15 // 5, token % 5])  # [axes, tokens]
    assert spec.pairs is not None
    angles = torch.cat(
        [
            p[:, None] * base ** (-torch.arange(n) / n).double()
            for p, n, base in zip(position, spec.pairs, spec.bases, strict=True)
        ],
        -1,
    )
    expected = as_complex(x, layout) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(as_complex(spec.rotate(x, frames), layout), expected, rtol=0, atol=1e-4)


def test_scores_depend_on_the_distance_of_frames_only() -> None:
    spec = RoPESpec(head_dim=128, grid=(1, 1))
    q, k = torch.randn(2, 1, 1, 128).double()

    def score(a: float, b: float) -> float:
        tables = [table.expand() for table in (spec.tables([a]), spec.tables([b]))]
        return float((rotate(q.float(), *tables[0], spec.layout) * rotate(k.float(), *tables[1], spec.layout)).sum())

    assert score(3, 10) == pytest.approx(score(103, 110), abs=1e-3)
    assert abs(score(3, 10) - score(3, 40)) > 1e-2


def test_channels_are_split_over_the_axes_as_wan_does() -> None:
    assert RoPESpec(head_dim=128, grid=(30, 52)).pairs == (22, 21, 21)
    assert RoPESpec(head_dim=64, grid=(2, 2)).pairs == (12, 10, 10)


def test_half_split_is_interleaved_with_the_channels_reordered() -> None:
    interleaved = RoPESpec(head_dim=64, grid=(2, 3))
    half = RoPESpec(head_dim=64, grid=(2, 3), layout=RoPELayout.HALF_SPLIT)
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    x = torch.randn(12, 3, 64)
    assert torch.equal(interleaved.rotate(x, [4, 9])[..., order], half.rotate(x[..., order].contiguous(), [4, 9]))


def test_half_precision_is_rotated_in_float32_and_rounded_once() -> None:
    spec = RoPESpec(head_dim=64, grid=(2, 3))
    x = torch.randn(6, 1, 64).bfloat16()
    assert torch.equal(spec.rotate(x, [100]), spec.rotate(x.float(), [100]).bfloat16())


def test_tables_expand_frame_by_frame() -> None:
    spec = RoPESpec(head_dim=64, grid=(2, 3))
    cos, sin = spec.tables([5, 2]).expand()
    again = spec.tables([2]).expand()
    assert cos.shape == sin.shape == (12, 32)
    assert torch.equal(cos[6:], again[0])
    assert torch.equal(sin[6:], again[1])


def test_pairs_that_do_not_fill_the_head_are_rejected() -> None:
    with pytest.raises(ArgumentError, match="pairs: expected a sum of head_dim / 2 = 32"):
        RoPESpec(head_dim=64, grid=(2, 2), pairs=(10, 10, 10))
    with pytest.raises(ArgumentError, match="grid"):
        RoPESpec(head_dim=64, grid=(0, 2))
