"""Camera paths that come back: out and back, two turns on the spot, and walks that return and set out again."""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from world_model.world import RETURN_PATHS, camera_paths, make_worlds, render

__all__ = ["KINDS", "Paths", "revisit_paths"]

KINDS = ("out-and-back", "double-spin", "returning-walk")
SPINS = (0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Held-out clips whose generated frames all show again what a given one showed.

    Attributes:
        frames: ``[paths, frames, 3, resolution, resolution]`` in [-1, 1], the renderer's truth.
        poses: ``[paths, frames, 3]``.
        source: ``[paths, frames]`` int64: the newest given frame with the same pose; itself for a given frame.
        given: frames that fill the cache; the rest is generated.
        seed: names the noise.
    """

    frames: Tensor
    poses: Tensor
    source: Tensor
    given: int
    seed: int = 0

    def __len__(self) -> int:
        return len(self.poses)

    def first(self, count: int) -> "Paths":
        """The first `count` of them; their noise is the same."""
        return replace(self, frames=self.frames[:count], poses=self.poses[:count], source=self.source[:count])

    @property
    def kind(self) -> list[str]:
        """Kind of every path."""
        return [KINDS[index % len(KINDS)] for index in range(len(self))]

    def noise(self, frame: int, seed: int = 0) -> Tensor:
        """Noise that `frame` of every path starts from, on the CPU; `seed` is added to that of the paths."""
        key = hashlib.blake2b(f"{self.seed + seed}/{frame}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return torch.randn(self.frames.shape[:1] + self.frames.shape[2:], generator=generator)


def revisit_paths(
    count: int, *, given: int = 32, resolution: int = 64, world_seed: int = 11, seed: int = 0, device: str = "cpu"
) -> Paths:
    """`count` clips of ``2 * given`` frames, the three kinds in turns; the same on every device."""
    frames, half = 2 * given, given // 2
    generator = torch.Generator().manual_seed(world_seed)
    rooms = make_worlds(count, generator, device)
    step = torch.arange(frames)
    sources = {
        "out-and-back": torch.where(step < given, step, frames - 1 - step),
        "double-spin": torch.where(step < given, step, step - given),
        "returning-walk": torch.where(step < given + half, frames - 1 - step, step - given),
    }
    poses = camera_paths(rooms, frames, generator, RETURN_PATHS)  # the first half of these is a random walk
    spins = camera_paths(rooms, frames, generator, SPINS)
    source = torch.stack([sources[KINDS[index % len(KINDS)]] for index in range(count)])
    source[:, :given] = step[:given]
    poses = torch.gather(poses, 1, source.to(poses.device)[..., None].expand_as(poses))
    poses[1 :: len(KINDS)] = spins[1 :: len(KINDS)]
    truth = render(rooms, poses, resolution)
    return Paths(frames=truth, poses=poses, source=source, given=given, seed=seed)
