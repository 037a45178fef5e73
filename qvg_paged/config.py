"""What a model's cache looks like, what a manager may use, what a stream keeps: frozen values, checked on creation."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import torch

from qvg_paged.errors import ConfigError
from qvg_paged.kernels.attention import AttentionPath
from qvg_paged.kernels.formats import PageFormat, get_format
from qvg_paged.kernels.requantise import shares_codebooks
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

__all__ = ["CacheConfig", "FreeFill", "KeyRotation", "ModelSpec", "QualityFloor", "Rung", "Window", "parse_bytes"]

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_UNITS = {"": 1, "B": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def parse_bytes(size: int | str) -> int:
    """Bytes of ``"24GiB"``, ``"100MB"``, ``"512 KiB"`` or a plain number.

    Raises:
        ConfigError: not a positive size.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMG]I?|)B?\s*", size.upper())
        if not match:
            raise ConfigError(f'memory: expected bytes or a size such as "24GiB", got {size!r}')
        size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int):
        raise ConfigError(f'memory: expected whole bytes or a size such as "24GiB", got {size!r}')
    if size <= 0:
        raise ConfigError(f"memory: expected a positive size, got {size}")
    return size


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_count(name: str, value: object, least: int) -> None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(is_count, f"{name}: expected an integer >= {least}, got {value!r}")


class Rung(IntEnum):
    """How a stream is stored, from the best to the cheapest; a stream only ever goes down."""

    NONE = 0
    """As its window and ``CacheConfig.format`` say."""
    TAIL = 1
    """No dense tail: frames are quantised as soon as a chunk's worth of them is committed."""
    SPANS = 2
    """All quantised frames are in ``CacheConfig.demote_to``."""


class KeyRotation(Enum):
    """Whether the engine's keys carry their rotary embedding already."""

    APPLIED = "applied"
    """Keys come rotated (HY-WorldPlay, LingBot); they are read back as stored."""
    ON_READ = "on_read"
    """Keys come unrotated (Self-Forcing, LongCat); reading turns them to the positions of the visible frames."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Geometry of a model's self-attention cache; with sharded heads, that of one rank.

    Attributes:
        num_layers: layers with a self-attention cache.
        num_kv_heads: KV heads of this rank.
        head_dim: 64, 128 or 256.
        tokens_per_frame: tokens of one latent frame.
        frames_per_chunk: most frames denoised together.
        num_q_heads: query heads, a multiple of `num_kv_heads`; None for as many.
        softmax_scale: None for ``head_dim ** -0.5``.
        dtype: of K and V as the engine gives them, and of unquantised pages.
        rope: whether keys come rotated; queries always do.
        rope_spec: how to rotate, required with ``rope="on_read"``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_frame: int
    frames_per_chunk: int
    num_q_heads: int | None = None
    softmax_scale: float | None = None
    dtype: torch.dtype = torch.bfloat16
    rope: KeyRotation | str = KeyRotation.APPLIED
    rope_spec: RoPESpec | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "tokens_per_frame", "frames_per_chunk"):
            _require_count(name, getattr(self, name), 1)
        _require(self.head_dim in HEAD_DIMS, f"head_dim: expected one of {HEAD_DIMS}, got {self.head_dim}")
        _require(self.dtype in DTYPES, f"dtype: expected one of {DTYPES}, got {self.dtype}")
        if self.num_q_heads is None:
            object.__setattr__(self, "num_q_heads", self.num_kv_heads)
        _require_count("num_q_heads", self.num_q_heads, 1)
        _require(
            self.query_heads % self.num_kv_heads == 0,
            f"num_q_heads: expected a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_q_heads}",
        )
        known = [mode.value for mode in KeyRotation]
        if isinstance(self.rope, str):
            _require(self.rope in known, f"rope: expected one of {known}, got {self.rope!r}")
            object.__setattr__(self, "rope", KeyRotation(self.rope))
        if self.rope is KeyRotation.ON_READ:
            _require(self.rope_spec is not None, 'rope_spec: expected a RoPESpec with rope="on_read", got None')
        if self.rope_spec is not None:
            spec = self.rope_spec
            _require(
                (spec.head_dim, spec.tokens_per_frame) == (self.head_dim, self.tokens_per_frame),
                f"rope_spec: expected head_dim={self.head_dim} and {self.tokens_per_frame} tokens per frame, "
                f"got {spec.head_dim} and {spec.tokens_per_frame}",
            )

    @property
    def query_heads(self) -> int:
        """Query heads of this rank."""
        return self.num_q_heads or self.num_kv_heads

    @property
    def scale(self) -> float:
        """The softmax scale in force."""
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def read_rope(self) -> RoPESpec | None:
        """Rotation to apply when keys are read, or None."""
        return self.rope_spec if self.rope is KeyRotation.ON_READ else None

    @property
    def key_pairing(self) -> RoPELayout:
        """Which key channels turn together, so that balancing may divide both by the same number."""
        return self.rope_spec.layout if self.rope_spec else RoPELayout.INTERLEAVED

    @property
    def frame_nbytes(self) -> int:
        """Bytes of one frame's K and V, unquantised, all layers."""
        elements = self.num_layers * 2 * self.tokens_per_frame * self.num_kv_heads * self.head_dim
        return elements * self.dtype.itemsize


class FreeFill(Enum):
    """What memory that was returned is overwritten with before anyone gets it again."""

    ZERO = "zero"
    POISON = "poison"
    """Bytes 0xFF, which read as NaN, as soon as nothing that was launched reads the memory: for tests."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What a manager may use and how it stores history.

    Attributes:
        memory: everything the manager allocates: pool, codebooks, staging, encode workspace, tables.
        format: name of a known format or a `PageFormat`.
        span_frames: consecutive frames quantised together.
        demote_to: lowest format that streams under pressure are demoted to: `format` itself allows their dense tails
            only, a format that differs from `format` in grid, block size and scale rule allows whole spans; None
            allows nothing and keeps no memory free for it.
        host_memory: pinned bytes for parked streams.
        disk_path: folder for parked streams, of this manager alone.
        disk_memory: bytes of files in it; needs `disk_path`.
        device: where the pool lives.
        staging: bytes of scratch for decoded history and partial results of attention; None for 1/16 of `memory`, at
            most 256 MiB for every 12 heads of 128 channels (1 GiB for 40).
        path: how attention reads pages.
        allow_fp8: whether ``path="auto"`` may attend to quantised pages in FP8 where that was measured to be faster;
            False keeps the queries' dtype.
        free_fill: what returned memory is overwritten with.
        on_event: called with every `CacheEvent`, after the books have changed and under the manager's lock; what it
            raises reaches the caller of the store, whose call took effect all the same.
    """

    memory: int | str
    format: str | PageFormat = "qvg4-int2"
    span_frames: int = 24
    demote_to: str | PageFormat | None = None
    host_memory: int | str = 0
    disk_path: str | Path | None = None
    disk_memory: int | str = 0
    device: str | torch.device = "cpu"
    staging: int | str | None = None
    path: AttentionPath | str = AttentionPath.AUTO
    allow_fp8: bool = True
    free_fill: FreeFill = FreeFill.ZERO
    on_event: Callable[[Any], None] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", parse_bytes(self.memory))
        object.__setattr__(self, "format", get_format(self.format))
        try:
            object.__setattr__(self, "device", torch.device(self.device))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"device: expected a device such as 'cpu' or 'cuda:0', got {self.device!r}") from error
        if self.staging is not None:
            object.__setattr__(self, "staging", parse_bytes(self.staging))
        if isinstance(self.path, str):
            known = [path.value for path in AttentionPath]
            _require(self.path in known, f"path: expected one of {known}, got {self.path!r}")
            object.__setattr__(self, "path", AttentionPath(self.path))
        _require_count("span_frames", self.span_frames, 1)
        if self.demote_to is not None:
            object.__setattr__(self, "demote_to", _checked_demotion(self.format, get_format(self.demote_to)))
        for name in ("host_memory", "disk_memory"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name)) if getattr(self, name) != 0 else 0)
        if self.disk_path is not None:
            object.__setattr__(self, "disk_path", Path(self.disk_path))
        _require(
            (self.disk_path is None) == (self.disk_memory == 0),
            f"disk_path, disk_memory: expected both or neither, got {self.disk_path!r} and {self.disk_memory!r}",
        )


def _checked_demotion(fmt: object, target: PageFormat) -> PageFormat:
    assert isinstance(fmt, PageFormat)
    _require(
        not fmt.is_dense and shares_codebooks(fmt.key, target.key) and shares_codebooks(fmt.value, target.value),
        f"demote_to: expected {fmt.name!r} but for grid, block size and scale rule, since a span keeps its codebook, "
        f"got {target.name!r}",
    )
    _require(
        target == fmt or target.name != fmt.name,
        f"demote_to: expected a format with a name of its own, got {target.name!r} twice; rename it with replace()",
    )
    return target


@dataclass(frozen=True, kw_only=True)
class QualityFloor:
    """How far a stream may be squeezed when memory is short.

    Attributes:
        rung: lowest rung of the ladder.
        retrieval_frames: frames kept past the visible ones in any case, as far as the window has them.
    """

    rung: Rung = Rung.SPANS
    retrieval_frames: int = 0

    def __post_init__(self) -> None:
        _require(isinstance(self.rung, Rung), f"rung: expected a Rung, got {self.rung!r}")
        _require_count("retrieval_frames", self.retrieval_frames, 0)

    def stricter(self, other: "QualityFloor") -> "QualityFloor":
        """What keeps both promises."""
        frames = max(self.retrieval_frames, other.retrieval_frames)
        return QualityFloor(rung=min(self.rung, other.rung), retrieval_frames=frames)


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a stream keeps of its history.

    Attributes:
        sink_frames: first frames, visible for ever.
        recent_frames: newest committed frames that stay visible.
        bf16_sink: keep the sink frames unquantised.
        bf16_recent: newest frames kept unquantised, beyond the open span.
        retrieval_frames: frames kept past the visible ones for `begin_chunk(retrieve=...)`, newest first.
    """

    sink_frames: int = 0
    recent_frames: int
    bf16_sink: bool = False
    bf16_recent: int = 0
    retrieval_frames: int = 0

    def __hash__(self) -> int:
        """Made once: schedulers look up what a stream of a window needs again and again."""
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            names = (field.name for field in fields(self))
            found = self.__dict__["_hash"] = hash(tuple([getattr(self, name) for name in names]))
        return found

    def __post_init__(self) -> None:
        for name in ("sink_frames", "bf16_recent", "retrieval_frames"):
            _require_count(name, getattr(self, name), 0)
        _require_count("recent_frames", self.recent_frames, 1)
