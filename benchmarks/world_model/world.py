"""Procedural rooms with textured walls, camera paths through them, and a batched ray-casting renderer.

A world is a square grid of cells, one unit wide. Wall cells are one unit high and the camera looks level from mid
height, so a wall at distance d covers ``focal / d`` pixels around the horizon and the floor row v pixels below the
horizon is ``focal / (2 v)`` away. Every wall and floor cell carries its own texture, which is what makes a place
recognisable when the camera comes back. Frames are licence-free: nothing but random numbers goes in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "FIELD_OF_VIEW",
    "PATH_SHARES",
    "RETURN_PATHS",
    "RoomVideos",
    "Worlds",
    "camera_paths",
    "make_worlds",
    "render",
]

FIELD_OF_VIEW = 1.4  # radians
CELLS = 6
TEXELS = 16
PATH_SHARES = (0.45, 0.35, 0.20)
"""Shares of random walks, out-and-back paths (the poses are a palindrome) and double turns on the spot."""
RETURN_PATHS = (0.0, 1.0, 0.0)
"""Out-and-back paths only: every pose of the second half was seen in the first."""
STEP = 0.22  # cells a frame
MAX_TURN = 0.28  # radians a frame
CLEARANCE = 0.25  # cells kept between camera and walls
SUPERSAMPLING = 2
RENDER_CHUNK = 256  # frames rendered at once on a CPU, to bound memory


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """A batch of rooms.

    Attributes:
        walls: ``[batch, CELLS, CELLS]`` bool, row y and column x.
        textures: ``[batch, 2 * CELLS**2, TEXELS, TEXELS, 3]`` float32 in [-1, 1]; the wall textures of all cells, then
            the floor textures.
    """

    walls: Tensor
    textures: Tensor

    def __getitem__(self, rows: slice) -> "Worlds":
        return Worlds(walls=self.walls[rows], textures=self.textures[rows])


def make_worlds(batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Worlds:
    """Draw `batch` rooms: closed at the border, open in the middle, 18 % of the other cells walls.

    Numbers come from `generator` on its own device, in a fixed order, so a seed on the CPU names the same rooms on
    every `device`.
    """
    walls = _uniform(generator, device, batch, CELLS, CELLS) < 0.18
    walls[:, 0] = walls[:, -1] = True
    walls[:, :, 0] = walls[:, :, -1] = True
    middle = slice(CELLS // 2 - 1, CELLS // 2 + 1)
    walls[:, middle, middle] = False
    wall_textures = _textures(batch, 4, generator, device)
    floor_textures = _textures(batch, 3, generator, device)
    return Worlds(walls=walls, textures=torch.cat([wall_textures, floor_textures], 1))


def _uniform(generator: torch.Generator, device: torch.device | str, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, device=generator.device).to(device)


def _textures(batch: int, blotches: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """One texture per cell: a base colour, smooth blotches and hard stripes, ``[batch, cells, TEXELS, TEXELS, 3]``."""
    cells = CELLS * CELLS
    base = _uniform(generator, device, batch, cells, 3, 1, 1) * 1.6 - 0.8
    coarse = _uniform(generator, device, batch * cells, 3, blotches, blotches) * 2 - 1
    smooth = functional.interpolate(coarse, size=(TEXELS, TEXELS), mode="bicubic").view(batch, cells, 3, TEXELS, TEXELS)
    stripes = (_uniform(generator, device, batch, cells, 1, 1, 1) * 3 + 1).floor()
    phase = _uniform(generator, device, batch, cells, 1, 1, 1) * 6.28
    upright = _uniform(generator, device, batch, cells, 1, 1, 1) > 0.5
    contrast = 0.25 * _uniform(generator, device, batch, cells, 3, 1, 1)
    ramp = torch.linspace(0, 1, TEXELS, device=device)
    along = torch.where(upright, ramp.view(1, 1, 1, 1, -1), ramp.view(1, 1, 1, -1, 1))
    bands = torch.sin(6.2832 * stripes * along + phase).sign() * contrast
    return (base + 0.45 * smooth + bands).clamp(-1, 1).permute(0, 1, 3, 4, 2).contiguous()


def camera_paths(
    worlds: Worlds, frames: int, generator: torch.Generator, shares: tuple[float, float, float] = PATH_SHARES
) -> Tensor:
    """Draw one camera path per world.

    Returns ``[batch, frames, 3]`` float32 poses: x and y in cells, heading in radians. `shares` are the probabilities
    of a random walk, an out-and-back path and two full turns on the spot.
    """
    batch, device = len(worlds.walls), worlds.walls.device
    x = CELLS / 2 + (_uniform(generator, device, batch) - 0.5) * 1.2
    y = CELLS / 2 + (_uniform(generator, device, batch) - 0.5) * 1.2
    heading = _uniform(generator, device, batch) * 6.2832
    turn = torch.zeros(batch, device=device)
    poses = [torch.stack([x, y, heading], -1)]
    for _ in range(1, frames):
        turn = (0.7 * turn + (_uniform(generator, device, batch) * 2 - 1) * MAX_TURN * 0.8).clamp(-MAX_TURN, MAX_TURN)
        heading = heading + turn
        new_x, new_y = x + STEP * torch.cos(heading), y + STEP * torch.sin(heading)
        clear = torch.ones(batch, dtype=torch.bool, device=device)
        for feeler in (0.0, 1.0, -1.0):
            reach_x = new_x + CLEARANCE * torch.cos(heading + feeler)
            reach_y = new_y + CLEARANCE * torch.sin(heading + feeler)
            clear &= ~_wall_at(worlds.walls, reach_x, reach_y)
        x, y = torch.where(clear, new_x, x), torch.where(clear, new_y, y)
        heading = torch.where(clear, heading, heading + MAX_TURN * 1.3)  # turn away from what is in the way
        poses.append(torch.stack([x, y, heading], -1))
    walk = torch.stack(poses, 1)
    kind = _uniform(generator, device, batch)[:, None, None]
    out = (frames + 1) // 2
    back = torch.cat([walk[:, :out], walk[:, : frames - out].flip(1)], 1)
    turns = walk[:, :1].repeat(1, frames, 1)
    turns[..., 2] += torch.arange(frames, device=device) * (4 * math.pi / frames)
    return torch.where(kind < shares[0], walk, torch.where(kind < shares[0] + shares[1], back, turns))


def _wall_at(walls: Tensor, x: Tensor, y: Tensor) -> Tensor:
    column, row = (c.floor().long().clamp(0, CELLS - 1) for c in (x, y))
    return walls[torch.arange(len(x), device=x.device), row, column]


@torch.no_grad()
def render(worlds: Worlds, poses: Tensor, resolution: int = 64) -> Tensor:
    """Frames seen from `poses` ``[batch, frames, 3]``: ``[batch, frames, 3, resolution, resolution]`` in [-1, 1]."""
    batch, frames = poses.shape[:2]
    room = torch.arange(batch, device=poses.device).repeat_interleave(frames)
    chunks = zip(torch.split(room, RENDER_CHUNK), torch.split(poses.flatten(0, 1), RENDER_CHUNK), strict=True)
    pictures = [render_views(worlds.walls, worlds.textures, r, p, resolution) for r, p in chunks]
    return torch.cat(pictures).view(batch, frames, 3, resolution, resolution)


def render_views(walls: Tensor, textures: Tensor, room: Tensor, poses: Tensor, resolution: int) -> Tensor:
    """Frames ``[views, 3, resolution, resolution]``: view i looks from ``poses[i]`` in room ``room[i]`` of a batch.

    `walls` and `textures` as in :class:`Worlds`, `room` ``[views]`` int64, `poses` ``[views, 3]``. Tensor code without
    host syncs or shapes that depend on data, so it can be compiled.
    """
    pixels, device = resolution * SUPERSAMPLING, poses.device
    tangent = math.tan(FIELD_OF_VIEW / 2)
    screen = ((torch.arange(pixels, device=device) + 0.5) / pixels * 2 - 1) * tangent
    x, y, heading = (c[:, None] for c in poses.unbind(-1))
    ray_x = torch.cos(heading) - screen * torch.sin(heading)  # [views, pixels], unit length along the view axis
    ray_y = torch.sin(heading) + screen * torch.cos(heading)
    distance, side, wall_cell = _cast_rays(walls, room[:, None], x, y, ray_x, ray_y)
    hit = torch.where(side, x + ray_x * distance, y + ray_y * distance)

    focal = 0.5 * pixels / tangent
    below = (torch.arange(pixels, device=device) + 0.5 - pixels / 2)[:, None]  # [pixels, 1], down is positive
    half_height = (0.5 * focal / distance)[:, None]
    on_wall = below.abs() < half_height  # [views, pixels, pixels]
    depth = (0.5 * focal / below.abs().clamp_min(0.5)).clamp_max(2 * CELLS)
    floor_x = x[..., None] + ray_x[:, None] * depth
    floor_y = y[..., None] + ray_y[:, None] * depth
    floor_cell = floor_y.floor().long().clamp(0, CELLS - 1) * CELLS + floor_x.floor().long().clamp(0, CELLS - 1)

    rise = (below / (2 * half_height.clamp_min(1e-3)) + 0.5).clamp(0, 0.999)
    row = _texel(torch.where(on_wall, rise, floor_y % 1))
    column = _texel(torch.where(on_wall, (hit % 1.0)[:, None], floor_x % 1))
    surface = torch.where(on_wall, wall_cell[:, None], CELLS * CELLS + floor_cell)
    surface = surface + room[:, None, None] * (2 * CELLS * CELLS)
    color = textures.view(-1, 3)[(surface * TEXELS + row) * TEXELS + column]

    sky = torch.tensor([0.35, 0.5, 0.8], device=device) - 0.02 * depth[..., None]
    color = torch.where((on_wall | (below > 0))[..., None], color, sky)
    wall_light = (1 - 0.25 * side.float()) / (1 + 0.10 * distance)
    light = torch.where(on_wall, wall_light[:, None], 1 / (1 + 0.10 * depth))
    image = (color + 1) * light[..., None] - 1
    fine = image.view(len(room), resolution, SUPERSAMPLING, resolution, SUPERSAMPLING, 3)
    return fine.mean((2, 4)).permute(0, 3, 1, 2).contiguous()


def _texel(fraction: Tensor) -> Tensor:
    return (fraction * TEXELS).long().clamp(0, TEXELS - 1)


def _cast_rays(
    walls: Tensor, room: Tensor, x: Tensor, y: Tensor, ray_x: Tensor, ray_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk each ray from cell to cell until a wall: distance, whether a y-face was hit, and the wall's cell."""
    column, row = (c.floor().long().expand(ray_x.shape) for c in (x, y))
    stride_x, stride_y = 1 / ray_x.abs().clamp_min(1e-6), 1 / ray_y.abs().clamp_min(1e-6)
    next_x = torch.where(ray_x > 0, column + 1 - x, x - column) * stride_x
    next_y = torch.where(ray_y > 0, row + 1 - y, y - row) * stride_y
    distance = torch.zeros_like(ray_x)
    side = torch.zeros_like(ray_x, dtype=torch.bool)
    done, cell = side, torch.zeros_like(column)
    for _ in range(2 * CELLS):  # no ray crosses more cells than that
        across_x = next_x < next_y
        reached = torch.where(across_x, next_x, next_y)
        column = torch.where(~done & across_x, column + ray_x.sign().long(), column)
        row = torch.where(~done & ~across_x, row + ray_y.sign().long(), row)
        here_row, here_column = row.clamp(0, CELLS - 1), column.clamp(0, CELLS - 1)
        hit = walls[room, here_row, here_column] & ~done
        distance = torch.where(hit, reached, distance)
        side = torch.where(hit, ~across_x, side)
        cell = torch.where(hit, here_row * CELLS + here_column, cell)
        done = done | hit
        next_x = torch.where(~done & across_x, next_x + stride_x, next_x)
        next_y = torch.where(~done & ~across_x, next_y + stride_y, next_y)
    return distance.clamp_min(0.05), side, cell


class RoomVideos:
    """Endless training clips; many rooms and paths are drawn at a time, because a path is a long row of tiny launches.

    Args:
        generator: source of all randomness; put it on the device that trains.
        compiled: render with ``torch.compile``, a few kernels instead of some hundred.
        rooms: rooms per draw; the same for all clip lengths, so that the renderer is compiled once.
    """

    def __init__(self, generator: torch.Generator, *, compiled: bool = False, rooms: int = 1536) -> None:
        self.generator, self.rooms = generator, rooms
        self._render = torch.compile(render_views, dynamic=False) if compiled else render_views

    @torch.no_grad()
    def batches(self, batch: int, frames: int, resolution: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frames ``[batch, frames, 3, resolution, resolution]`` and poses ``[batch, frames, 3]``, for ever."""
        if batch > self.rooms:
            raise ValueError(f"batch: expected at most the {self.rooms} rooms of a draw, got {batch}")
        while True:
            worlds = make_worlds(self.rooms, self.generator, self.generator.device)
            poses = camera_paths(worlds, frames, self.generator)
            for first in range(0, self.rooms - batch + 1, batch):
                room = torch.arange(first, first + batch, device=poses.device).repeat_interleave(frames)
                path = poses[first : first + batch].clone()
                views = self._render(worlds.walls, worlds.textures, room, path.flatten(0, 1), resolution)
                yield views.view(batch, frames, 3, resolution, resolution), path
