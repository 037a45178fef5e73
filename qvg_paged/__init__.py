"""Paged 2-bit KV cache for autoregressive video generation: one pool, many streams."""

from qvg_paged.budget import Budget, Estimate, estimate
from qvg_paged.chunk import Chunk, ChunkState
from qvg_paged.config import CacheConfig, FreeFill, KeyRotation, ModelSpec, QualityFloor, Rung, Window, parse_bytes
from qvg_paged.demote import FrameQuality
from qvg_paged.errors import (
    ArgumentError,
    ConfigError,
    CorruptedError,
    IntegrityError,
    NonFiniteError,
    OutOfMemoryError,
    QualityFloorError,
    QvgPagedError,
    StaleHandleError,
    StateError,
    StorageError,
)
from qvg_paged.events import FAULT_POINTS, CacheEvent, EventKind, inject_fault
from qvg_paged.kernels.attention import AttentionPath
from qvg_paged.kernels.formats import (
    FORMATS,
    QVG,
    QVG_PRO,
    BalanceRule,
    CentroidType,
    Codec,
    Grid,
    PageFormat,
    ScaleRule,
)
from qvg_paged.kernels.rope import RoPELayout, RoPESpec
from qvg_paged.manager import KVCacheManager
from qvg_paged.park import Tier
from qvg_paged.stats import CacheStats, StreamStats
from qvg_paged.stream import Stream
from qvg_paged.timeline import Demand, Timeline
from qvg_paged.warmup import warm_up

__version__ = "0.1.0"

__all__ = [
    "FAULT_POINTS",
    "FORMATS",
    "QVG",
    "QVG_PRO",
    "ArgumentError",
    "AttentionPath",
    "BalanceRule",
    "Budget",
    "CacheConfig",
    "CacheEvent",
    "CacheStats",
    "CentroidType",
    "Chunk",
    "ChunkState",
    "Codec",
    "ConfigError",
    "CorruptedError",
    "Demand",
    "Estimate",
    "EventKind",
    "FrameQuality",
    "FreeFill",
    "Grid",
    "IntegrityError",
    "KVCacheManager",
    "KeyRotation",
    "ModelSpec",
    "NonFiniteError",
    "OutOfMemoryError",
    "PageFormat",
    "QualityFloor",
    "QualityFloorError",
    "QvgPagedError",
    "RoPELayout",
    "RoPESpec",
    "Rung",
    "ScaleRule",
    "StaleHandleError",
    "StateError",
    "StorageError",
    "Stream",
    "StreamStats",
    "Tier",
    "Timeline",
    "Window",
    "estimate",
    "inject_fault",
    "parse_bytes",
    "warm_up",
]
