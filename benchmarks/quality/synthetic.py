"""K and V as real models have them, at their real number of tokens: for the error of a codec, not for pictures.

No dump of a real cache can be shipped. What is published of real ones can: spectra, means, outlier channels, and how
much of the energy centroids take away. A tensor here has the spectrum and the mean it is told to have; its tokens
follow a scene of soft regions that the camera pans across, plus detail that fades from frame to frame.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["STATISTICS", "Statistics", "synthesise"]

HEIGHT, WIDTH = 30, 52
"""Tokens of a latent frame of 480 x 832 pixels."""
REGIONS = 400
PAN = 0.35
"""Tokens by which the camera moves from frame to frame; half as much downwards."""
SOFTNESS = 6.0
RANKS = (0, 1, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """One tensor of a layer.

    Attributes:
        model, tensor: whose it is; "K" is before RoPE.
        frames: latent frames of a span.
        energy: share of the centred energy in the leading 1, 4, 8, 16, 32 and 64 principal components.
        rms: of all numbers.
        mean_share: share of the energy that the mean over tokens holds.
        scene: correlation with the scene; the rest is detail. Chosen so that `published` comes out.
        persistence: of the detail from a frame to the next.
        walls: channels whose mean is so many times as large.
        unevenness: spread of the logarithm of the tokens' sizes.
        published: relative error (root of energies) of Quant VideoGen with 256 centroids on the real tensor.
    """

    model: str
    tensor: str
    frames: int
    energy: tuple[float, ...]
    rms: float
    mean_share: float
    scene: float
    persistence: float
    walls: tuple[tuple[int, float], ...] = ()
    unevenness: float = 0.0
    published: tuple[float, float]

    @property
    def tokens(self) -> int:
        """Of a span."""
        return self.frames * HEIGHT * WIDTH

    def spectrum(self, dim: int = 128) -> Tensor:
        """Share of each component, ``[dim]``, largest first: what lies between the published ranks is spread evenly."""
        reached = (0.0, *self.energy, 1.0)
        shares = [
            (end - start) / (last - first)
            for first, last, start, end in zip(RANKS, RANKS[1:], reached, reached[1:], strict=False)
            for _ in range(first, last)
        ]
        return torch.tensor(shares[:dim]).sort(descending=True).values


STATISTICS = (
    Statistics(
        model="Self-Forcing", tensor="K", frames=24, energy=(0.16, 0.39, 0.55, 0.72, 0.86, 0.95), rms=1.3,
        mean_share=0.32, scene=0.86, persistence=0.9, walls=((2, 5.0), (3, 5.0), (48, 9.0)), published=(0.34, 0.37),
    ),
    Statistics(
        model="Self-Forcing", tensor="V", frames=24, energy=(0.11, 0.25, 0.38, 0.56, 0.74, 0.90), rms=1.04,
        mean_share=0.03, scene=0.78, persistence=0.7, unevenness=0.18, published=(0.50, 0.50),
    ),
    Statistics(
        model="LongCat", tensor="K", frames=19, energy=(0.14, 0.36, 0.51, 0.68, 0.84, 0.94), rms=1.6,
        mean_share=0.45, scene=0.88, persistence=0.9, walls=((33, 12.0), (35, 12.0), (1, 6.0)), published=(0.26, 0.32),
    ),
    Statistics(
        model="LongCat", tensor="V", frames=19, energy=(0.07, 0.20, 0.31, 0.46, 0.64, 0.85), rms=20.0,
        mean_share=0.03, scene=0.78, persistence=0.7, unevenness=0.15, published=(0.49, 0.51),
    ),
)  # fmt: skip
"""Middle layers; LongCat's published errors are of its layers 5 to 7."""


def synthesise(statistics: Statistics, heads: int, *, seed: int = 0, dim: int = 128) -> Tensor:
    """``[heads, tokens, dim]`` float32, the same for every call with these arguments."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_head(statistics, dim, generator) for _ in range(heads)])


def _head(statistics: Statistics, dim: int, generator: torch.Generator) -> Tensor:
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    scene = _scene(statistics.frames, dim, generator)
    detail = _detail(statistics.frames, dim, statistics.persistence, generator)
    latent = statistics.scene * scene + math.sqrt(1 - statistics.scene**2) * detail
    if statistics.unevenness:
        sizes = torch.randn(*latent.shape[:2], 1, generator=generator)
        latent = latent * torch.exp(statistics.unevenness * sizes)
    content = (latent.flatten(0, 1) * statistics.spectrum(dim).sqrt()) @ basis.T
    content = content - content.mean(0)
    mean = torch.randn(dim, generator=generator)
    for channel, factor in statistics.walls:
        mean[channel] = factor * mean.abs().mean() * mean[channel].sign()
    share = statistics.mean_share
    return statistics.rms * (math.sqrt(1 - share) * _unit(content) + math.sqrt(share) * _unit(mean))


def _unit(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt()


def _scene(frames: int, dim: int, generator: torch.Generator) -> Tensor:
    """Regions with a code each, drifting, seen through a panning window: ``[frames, tokens of a frame, dim]``."""
    size = torch.tensor([HEIGHT + PAN * frames, WIDTH + PAN * frames])
    places = torch.rand(REGIONS, 2, generator=generator) * size
    drift = 0.15 * torch.randn(REGIONS, 2, generator=generator)
    codes = torch.randn(REGIONS, dim, generator=generator)
    row, column = torch.meshgrid(torch.arange(float(HEIGHT)), torch.arange(float(WIDTH)), indexing="ij")
    grid = torch.stack([row, column], -1).view(-1, 2)
    seen = []
    for frame in range(frames):
        camera = torch.tensor([0.5 * PAN * frame, PAN * frame])
        distance = torch.cdist(grid + camera, places + frame * drift).square()
        weight = torch.softmax(-distance / SOFTNESS, -1)
        seen.append(weight @ codes / weight.square().sum(-1, keepdim=True).sqrt())
    return torch.stack(seen)


def _detail(frames: int, dim: int, persistence: float, generator: torch.Generator) -> Tensor:
    """Noise of unit size that a frame takes over from the one before, ``[frames, tokens of a frame, dim]``."""
    found = [torch.randn(HEIGHT * WIDTH, dim, generator=generator)]
    for _ in range(frames - 1):
        new = torch.randn(HEIGHT * WIDTH, dim, generator=generator)
        found.append(persistence * found[-1] + math.sqrt(1 - persistence**2) * new)
    return torch.stack(found)
