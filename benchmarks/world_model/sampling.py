"""Generation frame by frame: a few Euler steps, then one clean pass that leaves the frame's K/V in the cache."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from world_model.model import WorldModel, rotate

__all__ = ["Chunk", "DenseCache", "History", "denoise", "generate", "noise_levels"]


class Chunk(Protocol):
    """The frames being generated: K/V overwritten by each pass until :meth:`commit` makes the last ones history."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q over the history and this chunk; ``[batch, tokens, heads, head_dim]``."""
        ...

    def commit(self) -> None:
        """Make the chunk history."""
        ...


class History(Protocol):
    """Anything that remembers K/V."""

    def begin_chunk(self) -> Chunk:
        """Open the next chunk."""
        ...


class DenseCache:
    """Unquantised K/V of streams in step, one frame per chunk: what a quantised cache is compared with.

    Keys are kept as given and rotated once more for reading, at their absolute frame position.

    Args:
        model: fixes layers, heads, positions and device.
        batch: streams.
        frames: capacity.
        window: frames that stay visible besides the one in progress; None for all.
        first_frame: position of the first frame, or ``[batch]`` positions.
    """

    def __init__(
        self, model: WorldModel, batch: int, frames: int, *, window: int | None = None, first_frame: int | Tensor = 0
    ) -> None:
        config = model.config
        self.frames, self.window, self.committed = frames, window, 0
        self.tokens_per_frame = config.tokens_per_frame
        self.shape = (batch, frames * config.tokens_per_frame, config.heads, config.head_dim)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._rotated: list[Tensor] = []
        self._cos, self._sin = model.rope_tables(first_frame, frames)

    def begin_chunk(self) -> "DenseCache":
        """The cache is its own chunk: the one frame after the committed ones."""
        if self.committed == self.frames:
            raise ValueError(f"frames: expected room for another frame, got a full cache of {self.frames}; enlarge it")
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Overwrite the frame in progress with `k`, `v` and attend to it and the visible history."""
        if layer == len(self.keys):
            for planes in (self.keys, self.values, self._rotated):
                planes.append(k.new_zeros(self.shape))
        new = slice(self.committed * self.tokens_per_frame, (self.committed + 1) * self.tokens_per_frame)
        self.keys[layer][:, new] = k
        self.values[layer][:, new] = v
        self._rotated[layer][:, new] = rotate(k, self._cos[:, new], self._sin[:, new])
        first = 0 if self.window is None else max(0, self.committed - self.window)
        visible = slice(first * self.tokens_per_frame, new.stop)
        keys, values = (plane[layer][:, visible].transpose(1, 2) for plane in (self._rotated, self.values))
        return functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)

    def commit(self) -> None:
        """Freeze the frame in progress."""
        self.committed += 1


def noise_levels(steps: int, shift: float = 3.0) -> list[float]:
    """Noise levels from 1 to 0 in `steps` steps, pushed towards 1 by `shift`: ``shift u / (1 + (shift - 1) u)``."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    uniform = [1 - i / steps for i in range(steps + 1)]
    return [shift * u / (1 + (shift - 1) * u) for u in uniform]


def denoise(
    model: WorldModel,
    noise: Tensor,
    pose: Tensor,
    reference_pose: Tensor,
    first_frame: int | Tensor,
    chunk: Chunk,
    levels: Sequence[float],
) -> Tensor:
    """Clean frames in [-1, 1] from `noise` (arguments as :meth:`WorldModel.forward`); nothing is committed."""
    x = noise
    for level, next_level in pairwise(levels):
        t = torch.full(x.shape[:2], level, device=x.device)
        clean = model(x, t, pose, reference_pose, first_frame, chunk.attend).float()
        x = clean + (x - clean) * (next_level / level)
    return x.clamp(-1, 1)


@torch.no_grad()
def generate(
    model: WorldModel,
    context: Tensor,
    poses: Tensor,
    history: History,
    *,
    steps: int = 4,
    shift: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Continue videos along given camera paths.

    Args:
        model: in evaluation mode; wrap the call in autocast for BF16.
        context: ``[batch, given, 3, resolution, resolution]``, frames written to the cache first.
        poses: ``[batch, frames, 3]`` with frames > given; the first pose is the reference.
        history: an empty cache for the batch, with frames of room.
        steps: Euler steps per frame.
        shift: see :func:`noise_levels`.
        seed: names the noise, which is drawn on the CPU and thus the same on every device.

    Returns:
        ``[batch, frames, 3, resolution, resolution]``, the context included.
    """
    given, frames = context.shape[1], poses.shape[1]
    if given >= frames:
        raise ValueError(f"poses: expected more frames than the {given} given ones, got {frames}")
    generator = torch.Generator().manual_seed(seed)
    levels, reference = noise_levels(steps, shift), poses[:, :1]
    video = [*torch.split(context, 1, 1)]
    for frame in range(frames):
        chunk, pose = history.begin_chunk(), poses[:, frame : frame + 1]
        if frame >= given:
            noise = torch.randn(video[0].shape, generator=generator).to(context.device)
            video.append(denoise(model, noise, pose, reference, frame, chunk, levels))
        clean = torch.zeros(len(poses), 1, device=context.device)
        model(video[frame], clean, pose, reference, frame, chunk.attend)
        chunk.commit()
    return torch.cat(video, 1)
