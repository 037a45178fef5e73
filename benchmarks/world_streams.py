"""The world model as an engine that embeds the cache manager: many streams, one chunk of each at a time.

A stream is a `Shot`: frames that are given, a camera path, a seed. Given frames are written to the cache by one clean
pass each; every later frame is denoised with a few Euler steps and then written by a clean pass as well. All streams
of a call share one batch through the model and one launch of attention per layer (`KVCacheManager.attend`), wherever
each of them is on its path.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from world_model.model import ROPE_BASES, WorldModel, WorldModelConfig
from world_model.sampling import noise_levels
from world_model.world import RETURN_PATHS, camera_paths, make_worlds, render

from qvg_paged import (
    CacheConfig,
    Chunk,
    ChunkState,
    ConfigError,
    KVCacheManager,
    ModelSpec,
    RoPELayout,
    RoPESpec,
    Stream,
    Window,
    estimate,
)

__all__ = ["HistoryRead", "Shot", "WorldEngine", "WorldStream", "fit_memory", "generate", "model_spec", "return_shots"]

STEP = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Shot:
    """What one stream shows.

    Attributes:
        id: name of the stream; names its noise too.
        tenant: owner.
        truth: ``[frames, 3, resolution, resolution]`` in [-1, 1], as the renderer sees the whole path.
        poses: ``[frames, 3]``; the first pose is the reference of all.
        given: frames of `truth` that are written to the cache; the rest is generated.
        seed: names the noise, together with `id` and the frame.
    """

    id: str
    tenant: str = "default"
    truth: Tensor
    poses: Tensor
    given: int
    seed: int = 0

    @property
    def frames(self) -> int:
        """Frames of the whole path."""
        return len(self.poses)

    def noise(self, frame: int) -> Tensor:
        """Noise a frame starts from, ``[3, resolution, resolution]`` on the CPU: the same in any batch and device."""
        key = hashlib.blake2b(f"{self.seed}/{self.id}/{frame}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key, "little"))
        return torch.randn(self.truth.shape[1:], generator=generator)


def return_shots(
    count: int,
    *,
    given: int,
    generated: int,
    tenants: Sequence[str] = ("default",),
    resolution: int = 64,
    seed: int = 0,
    world_seed: int = 7,
    device: torch.device | str = "cpu",
) -> list[Shot]:
    """Out-and-back camera paths through `count` rooms: the way back shows again what the way out showed.

    With as many generated frames as given ones, every generated frame revisits a given one. Tenants take turns.
    `world_seed` names rooms and paths, `seed` the noise; both mean the same on every device.
    """
    generator = torch.Generator().manual_seed(world_seed)
    rooms = make_worlds(count, generator, device)
    poses = camera_paths(rooms, given + generated, generator, RETURN_PATHS)
    truth = render(rooms, poses, resolution)
    return [
        Shot(
            id=f"shot-{index + 1}",
            tenant=tenants[index % len(tenants)],
            truth=truth[index],
            poses=poses[index],
            given=given,
            seed=seed,
        )
        for index in range(count)
    ]


def model_spec(config: WorldModelConfig, *, dtype: torch.dtype = torch.bfloat16) -> ModelSpec:
    """What the cache manager must know of a world model: one frame per chunk, keys cached before RoPE."""
    rope = RoPESpec(
        head_dim=config.head_dim,
        grid=(config.grid, config.grid),
        layout=RoPELayout.INTERLEAVED,
        pairs=config.rope_pairs,
        bases=ROPE_BASES,
    )
    return ModelSpec(
        num_layers=config.layers,
        num_kv_heads=config.heads,
        head_dim=config.head_dim,
        tokens_per_frame=config.tokens_per_frame,
        frames_per_chunk=1,
        dtype=dtype,
        rope="on_read",
        rope_spec=rope,
    )


def fit_memory(model: ModelSpec, config: CacheConfig, window: Window, *, frames: int, streams: int) -> CacheConfig:
    """`config` with the least memory, in steps of 64 KiB, that holds so many streams of `frames` frames at their worst.

    Raises:
        ConfigError: the streams are too many for any machine.
    """

    def enough(steps: int) -> bool:
        try:
            return estimate(model, replace(config, memory=steps * STEP), window, frames).streams >= streams
        except ConfigError:
            return False

    high = 1
    while not enough(high):
        high *= 2
        if high * STEP > 1 << 44:
            raise ConfigError(f"streams: expected a number that fits 16 TiB, got {streams} streams of {frames} frames")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return replace(config, memory=high * STEP)


@dataclass(frozen=True)
class HistoryRead:
    """History tokens that a chunk's attention read, by how they were stored."""

    tokens: int = 0
    quantised_tokens: int = 0

    @property
    def quantised_share(self) -> float:
        """Share read in the quantised format; 0 without history."""
        return self.quantised_tokens / self.tokens if self.tokens else 0.0

    @classmethod
    def of(cls, chunk: Chunk) -> "HistoryRead":
        """From the block table of an open chunk; its own frames do not count."""
        formats = chunk.table.formats[: len(chunk.visible)]
        per_frame = chunk.num_tokens // len(chunk.frames)
        return cls(len(formats) * per_frame, sum(1 for fmt in formats if fmt) * per_frame)


class WorldStream:
    """A shot on its way.

    Attributes:
        shot: what it shows.
        stream: its stream of the cache manager.
        video: frames so far, each ``[3, resolution, resolution]`` on the manager's device.
        last_read: history that the newest chunk read.
    """

    def __init__(self, shot: Shot, stream: Stream) -> None:
        self.shot = shot
        self.stream = stream
        self.video: list[Tensor] = []
        self.last_read = HistoryRead()

    @property
    def frame(self) -> int:
        """The next frame."""
        return self.stream.committed

    @property
    def generating(self) -> bool:
        """Whether the next frame is generated, not given."""
        return self.frame >= self.shot.given

    @property
    def done(self) -> bool:
        """Whether every frame is committed."""
        return self.frame >= self.shot.frames


class WorldEngine:
    """Advances streams of one cache manager with a world model: float32 on a CPU, BF16 autocast on a GPU.

    Args:
        model: in evaluation mode, on the manager's device.
        cache: made for ``model_spec(model.config)``.
        steps: Euler steps per generated frame.
        shift: see `world_model.sampling.noise_levels`.
    """

    def __init__(self, model: WorldModel, cache: KVCacheManager, *, steps: int = 2, shift: float = 3.0) -> None:
        self.model = model
        self.cache = cache
        self.levels = noise_levels(steps, shift)

    def open(self, shot: Shot, window: Window | None = None) -> WorldStream:
        """Open a stream for a shot; without a window everything stays visible."""
        window = window or Window(recent_frames=shot.frames)
        return self.attach(shot, self.cache.open(shot.id, tenant=shot.tenant, window=window))

    def attach(self, shot: Shot, stream: Stream) -> WorldStream:
        """The same for a stream that someone else opened, such as a scheduler."""
        return WorldStream(shot, stream)

    @torch.no_grad()
    def advance(self, streams: Sequence[WorldStream], retrieve: Sequence[int] = ()) -> None:
        """One chunk (one frame) of each stream, all in one batch: denoise what is generated, clean pass, commit.

        `retrieve` are frames kept past the window that all of them shall see as well.

        Raises:
            OutOfMemoryError: the pool cannot hold all of these chunks; no stream has moved.
            QvgPagedError: a commit failed; streams whose frame was committed have moved, the others have not.
        """
        chunks = self.cache.begin_chunks([stream.stream for stream in streams], retrieve=retrieve)
        try:
            with self._autocast():
                frames = self._frames(streams, chunks)
                self._forward(frames, 0.0, self._conditions(streams), chunks)
            try:
                self.cache.commit(chunks)
            finally:  # a commit of several may fail after some
                for stream, chunk, frame in zip(streams, chunks, frames, strict=True):
                    if chunk.state is ChunkState.COMMITTED:
                        stream.last_read = HistoryRead.of(chunk)
                        stream.video.append(frame)
        finally:
            for chunk in chunks:
                self.cache.abort(chunk)  # does nothing to a committed chunk

    def _autocast(self) -> AbstractContextManager[object]:
        device = self.cache.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def _frames(self, streams: Sequence[WorldStream], chunks: Sequence[Chunk]) -> Tensor:
        """The frames that become history, ``[streams, 3, resolution, resolution]``."""
        frames = [None if s.generating else s.shot.truth[s.frame].to(self.cache.device) for s in streams]
        moving = [index for index, frame in enumerate(frames) if frame is None]
        if moving:
            denoised = self._denoise([streams[index] for index in moving], [chunks[index] for index in moving])
            for index, frame in zip(moving, denoised, strict=True):
                frames[index] = frame
        return torch.stack([frame for frame in frames if frame is not None])

    def _denoise(self, streams: Sequence[WorldStream], chunks: Sequence[Chunk]) -> Tensor:
        x = torch.stack([stream.shot.noise(stream.frame) for stream in streams]).to(self.cache.device)
        conditions = self._conditions(streams)
        for level, next_level in zip(self.levels[:-1], self.levels[1:], strict=True):
            clean = self._forward(x, level, conditions, chunks)
            x = clean + (x - clean) * (next_level / level)
        return x.clamp(-1, 1)

    def _conditions(self, streams: Sequence[WorldStream]) -> tuple[Tensor, Tensor, Tensor]:
        """Poses of the next frames, reference poses, numbers of the next frames: uploaded once, not in every step."""
        device = self.cache.device
        pose = torch.stack([stream.shot.poses[stream.frame] for stream in streams]).to(device)[:, None]
        reference = torch.stack([stream.shot.poses[0] for stream in streams]).to(device)[:, None]
        return pose, reference, torch.tensor([stream.frame for stream in streams]).to(device, non_blocking=True)

    def _forward(
        self, x: Tensor, level: float, conditions: tuple[Tensor, Tensor, Tensor], chunks: Sequence[Chunk]
    ) -> Tensor:
        """The model's idea of the clean frames; K and V of every layer are written to the chunks on the way."""
        t = torch.full((len(x), 1), level, device=self.cache.device)
        clean: Tensor = self.model(x[:, None], t, *conditions, self._attend(chunks))
        return clean[:, 0].float()

    def _attend(self, chunks: Sequence[Chunk]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        dtype = self.cache.model.dtype

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat_q, flat_k, flat_v = q.flatten(0, 1), k.flatten(0, 1).to(dtype), v.flatten(0, 1).to(dtype)
            return self.cache.attend(layer, chunks, flat_q, flat_k, flat_v).view_as(q)

        return attend


def generate(
    model: WorldModel,
    cache: KVCacheManager,
    shots: Sequence[Shot],
    *,
    window: Window | None = None,
    steps: int = 2,
    shift: float = 3.0,
    on_chunk: Callable[[Sequence[WorldStream]], None] | None = None,
) -> list[WorldStream]:
    """Open a stream per shot, advance all of them together to their ends, and close them.

    `on_chunk` is called after every chunk. The returned streams hold the videos; their cache memory is returned.

    Raises:
        OutOfMemoryError: the manager cannot hold all shots at once; the streams are closed.
    """
    engine = WorldEngine(model, cache, steps=steps, shift=shift)
    streams: list[WorldStream] = []
    try:
        streams += [engine.open(shot, window) for shot in shots]
        while unfinished := [stream for stream in streams if not stream.done]:
            engine.advance(unfinished)
            if on_chunk is not None:
                on_chunk(streams)
    finally:
        for stream in streams:
            stream.stream.close()
    return streams
