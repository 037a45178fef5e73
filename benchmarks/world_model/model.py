"""A causal diffusion transformer for video: pixel patches in, clean frames out, keys cached before RoPE.

Every frame is ``tokens_per_frame`` patch tokens. A token carries its noisy patch, the camera ray through it (relative
to a reference pose, the stream's first) and, through adaptive layer norm, its frame's noise level. Attention is
given by the caller: the model hands over rotated queries and *unrotated* keys, so the same weights run on a plain
cache, on quantised pages or, in training, on whole clips.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from world_model.world import FIELD_OF_VIEW

__all__ = ["ROPE_BASES", "ROPE_PAIRS", "Attend", "Block", "WorldModel", "WorldModelConfig", "load_model", "rotate"]

ROPE_PAIRS = (22, 21, 21)
"""Channel pairs (2j, 2j + 1) of a 128-channel head that turn with frame, row and column."""
ROPE_BASES = (100.0, 100.0, 100.0)
"""Pair j of an axis with m pairs turns by ``position * base ** (-j / m)`` radians."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q, k, v)``: q rotated, k not rotated; all ``[batch, tokens, heads, head_dim]``, as the result."""


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """Sizes of the model; the defaults are the shipped one (22.66 M parameters)."""

    resolution: int = 64
    patch: int = 8
    dim: int = 384
    layers: int = 12
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.dim % self.head_dim:
            raise ValueError(f"dim: expected a multiple of head_dim {self.head_dim}, got {self.dim}")
        if self.resolution % self.patch:
            raise ValueError(f"resolution: expected a multiple of patch {self.patch}, got {self.resolution}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.dim // self.head_dim

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.resolution // self.patch

    @property
    def tokens_per_frame(self) -> int:
        """Patches of a frame."""
        return self.grid * self.grid

    @property
    def rope_pairs(self) -> tuple[int, int, int]:
        """Pairs per axis: two thirds go to row and column, the rest to the frame."""
        third = self.head_dim // 2 // 3
        return self.head_dim // 2 - 2 * third, third, third


class RMSNorm(nn.Module):
    """Root-mean-square norm over all channels (before they are split into heads) with a learned gain, in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; float32 whatever comes in."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g


class Block(nn.Module):
    """Attention and MLP under adaptive layer norm, split around the attention itself."""

    def __init__(self, config: WorldModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.o = nn.Linear(dim, dim, bias=False)
        self.nq, self.nk = RMSNorm(dim), RMSNorm(dim)
        self.f1, self.f2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.tab = nn.Parameter(torch.zeros(6, dim))  # this layer's offset to the shared modulation
        for weight in (self.o.weight, self.f2.weight, self.f2.bias):
            nn.init.zeros_(weight)

    def project(self, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, unrotated k, and v, each ``[batch, tokens, heads, head_dim]`` in the dtype of the projections.

        `x`: ``[batch, tokens, dim]``; `modulation`: ``[batch, frames, 6, dim]``; `cos`, `sin` of the tokens.
        """
        shift, scale = (modulation + self.tab)[:, :, :2].unbind(2)
        q, k, v = self.qkv(_modulate(x, shift, scale)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (self.nq(q), self.nk(k), v))
        return rotate(q, cos, sin).to(v.dtype), k.to(v.dtype), v

    def finish(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Add what was `attended`, then the MLP: the block's output ``[batch, tokens, dim]``."""
        gate, shift, scale, mlp_gate = (modulation + self.tab)[:, :, 2:].unbind(2)
        x = x + _per_frame(self.o(attended.flatten(-2)), gate)
        hidden = functional.gelu(self.f1(_modulate(x, shift, scale)), approximate="tanh")
        out: Tensor = x + _per_frame(self.f2(hidden), mlp_gate)
        return out


def _per_frame(x: Tensor, factor: Tensor) -> Tensor:
    batch, frames = factor.shape[:2]
    return (x.view(batch, frames, -1, x.shape[-1]) * factor[:, :, None]).flatten(1, 2)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    batch, frames = shift.shape[:2]
    normed = functional.layer_norm(x, x.shape[-1:]).view(batch, frames, -1, x.shape[-1])
    return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (2j, 2j + 1) of `x` ``[batch, tokens, heads, head_dim]``; float32 inside, x's dtype out.

    `cos`, `sin`: ``[batch or 1, tokens, head_dim / 2]`` float32.
    """
    wide = x.float()
    even, odd = wide[..., 0::2], wide[..., 1::2]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class WorldModel(nn.Module):
    """Predicts clean frames from noisy ones, camera poses and whatever past the caller's attention brings in."""

    def __init__(self, config: WorldModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or WorldModelConfig()
        dim, pixels = config.dim, 3 * config.patch**2
        self.inp = nn.Linear(pixels, dim)
        self.ray = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.temb = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        final = nn.Linear(dim, 6 * dim)
        self.mod = nn.Sequential(nn.SiLU(), final)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.out = nn.Linear(dim, pixels)
        for weight in (final.weight, final.bias, self.out.weight):
            nn.init.zeros_(weight)
        with torch.no_grad():
            final.bias.view(6, dim)[[2, 5]] = 1.0  # gates start open; o and f2 start at zero instead

    def forward(
        self,
        x_t: Tensor,
        noise_level: Tensor,
        pose: Tensor,
        reference_pose: Tensor,
        first_frame: int | Tensor,
        attend: Attend,
    ) -> Tensor:
        """Predict the clean frames.

        Args:
            x_t: ``[batch, frames, 3, resolution, resolution]``, ``(1 - t) * clean + t * noise``.
            noise_level: ``[batch, frames]``, t in [0, 1].
            pose, reference_pose: ``[batch, frames, 3]`` and ``[batch, 1, 3]``: x, y, heading.
            first_frame: position of the first frame, or ``[batch]`` positions when the rows' streams differ.
            attend: called once per layer; see :data:`Attend`. Writing K/V of a clean frame is a call with t = 0.

        Returns:
            ``[batch, frames, 3, resolution, resolution]``.
        """
        x, modulation = self.embed(x_t, noise_level, pose, reference_pose)
        cos, sin = self.rope_tables(first_frame, x_t.shape[1])
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            q, k, v = block.project(x, modulation, cos, sin)
            x = block.finish(x, attend(layer, q, k, v), modulation)
        return self.read_out(x)

    def embed(self, x_t: Tensor, noise_level: Tensor, pose: Tensor, reference_pose: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, tokens, dim]`` and modulation ``[batch, frames, 6, dim]`` that the blocks start from."""
        patch, grid = self.config.patch, self.config.grid
        batch, frames = x_t.shape[:2]
        pixels = x_t.view(batch, frames, 3, grid, patch, grid, patch).permute(0, 1, 3, 5, 2, 4, 6)
        tokens = self.inp(pixels.reshape(batch, -1, 3 * patch * patch)) + self.ray(self._rays(pose, reference_pose))
        speed = torch.exp(-torch.arange(32, device=x_t.device) / 32 * 6.0) * 100
        angle = noise_level[..., None] * speed
        modulation = self.mod(self.temb(torch.cat([angle.sin(), angle.cos()], -1)))
        return tokens.float(), modulation.unflatten(-1, (6, -1))

    def read_out(self, x: Tensor) -> Tensor:
        """Tokens ``[batch, tokens, dim]`` to frames ``[batch, frames, 3, resolution, resolution]``."""
        patch, grid = self.config.patch, self.config.grid
        pixels: Tensor = self.out(functional.layer_norm(x, x.shape[-1:]))
        pixels = pixels.view(len(x), -1, grid, grid, 3, patch, patch).permute(0, 1, 4, 2, 5, 3, 6)
        return pixels.reshape(len(x), -1, 3, grid * patch, grid * patch)

    def rope_tables(self, first_frame: int | Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[batch or 1, frames * tokens_per_frame, head_dim / 2]`` float32, from float64 angles."""
        device, grid = self.inp.weight.device, self.config.grid
        start = torch.as_tensor(first_frame, dtype=torch.float64, device=device).reshape(-1, 1)
        raster = torch.arange(grid * grid, dtype=torch.float64, device=device)
        axes = (
            (start + torch.arange(frames, device=device))[:, :, None],
            (raster // grid)[None, None],
            (raster % grid)[None, None],
        )
        shape = (len(start), frames, grid * grid, -1)
        angles = []
        for position, pairs, base in zip(axes, self.config.rope_pairs, ROPE_BASES, strict=True):
            speed = base ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
            angles.append((position[..., None] * speed).expand(shape))
        angle = torch.cat(angles, -1).flatten(1, 2)
        return angle.cos().float(), angle.sin().float()

    def _rays(self, pose: Tensor, reference: Tensor) -> Tensor:
        """Camera position and viewing ray of each patch in the reference camera's frame, ``[batch, tokens, 32]``."""
        grid, device = self.config.grid, pose.device
        cos, sin = torch.cos(reference[..., 2]), torch.sin(reference[..., 2])
        dx, dy = (pose[..., :2] - reference[..., :2]).unbind(-1)
        origin = torch.stack([dx * cos + dy * sin, dy * cos - dx * sin], -1)  # [batch, frames, 2]
        heading = (pose[..., 2] - reference[..., 2])[..., None, None]
        slope = ((torch.arange(grid, device=device) + 0.5) / grid * 2 - 1) * math.tan(FIELD_OF_VIEW / 2)
        right, down = slope.view(1, grid), slope.view(grid, 1)
        ahead, aside = torch.cos(heading), torch.sin(heading)
        across = torch.stack([ahead - right * aside, aside + right * ahead], -1).expand(-1, -1, grid, -1, -1)
        ray = torch.cat([across, down.expand(*across.shape[:-1])[..., None]], -1)  # [batch, frames, grid, grid, 3]
        waves = (origin[..., None] * (0.4 * 2.0 ** torch.arange(6, device=device))).flatten(-2)
        place = torch.cat([origin, waves.sin(), waves.cos()], -1)[:, :, None, None].expand(*ray.shape[:-1], -1)
        return torch.cat([place, ray, functional.normalize(ray, dim=-1)], -1).flatten(1, 3)


def load_model(
    path: Path | str, device: torch.device | str = "cpu", config: WorldModelConfig | None = None
) -> WorldModel:
    """Read a safetensors file of weights into a float32 model in evaluation mode; run it under autocast on a GPU.

    Without `config` width and depth are those of the weights, everything else the default.
    """
    from safetensors.torch import load_file  # noqa: PLC0415 - training machines may lack it

    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    if config is None:
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        config = WorldModelConfig(dim=len(weights["inp.weight"]), layers=layers)
    model = WorldModel(config)
    model.load_state_dict(weights)
    return model.to(device).eval()
