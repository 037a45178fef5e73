"""A real manager, sized like a simulated pool, as the scheduler sees it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qvg_paged import FORMATS, CacheConfig, KVCacheManager, PageFormat, ScaleRule, Window
from qvg_paged.budget import Budget, stream_timeline
from qvg_paged.scheduler import TieredCache
from qvg_paged.timeline import Demand
from stress.ladder_cache import LADDERS
from stress.models import Geometry, StaticCache
from stress.scenario import Scenario

__all__ = ["LadderManagerCache", "ManagerCache", "ParkingManagerCache", "make_cache", "reduced"]



def _fast(name: str) -> PageFormat:
    return FORMATS[name].with_codecs(iterations=1, num_centroids=2, scale_rule=ScaleRule.ABSMAX)


def _formats(scenario: Scenario, *, real: bool) -> dict[str, Any]:
    """Formats of the scenario's ladder; those of small heads, or of a CPU, are quick ones."""
    kept, cheapest = LADDERS.get(scenario.ladder, ("qvg4-int2", None))
    make = FORMATS.__getitem__ if real else _fast
    return {"format": make(kept), "demote_to": None if cheapest is None else make(cheapest)}


def reduced(geometry: Geometry) -> Geometry:
    """The same chunk, span and window with two layers of two small heads and eight tokens a frame."""
    model = replace(geometry.model, num_layers=2, num_kv_heads=2, head_dim=64, tokens_per_frame=8, dtype=torch.float32)
    return replace(geometry, model=model)


class ManagerCache:
    """Books of a manager.

    Args:
        manager: whose pool is shared out.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self.manager = manager
        self.pool_nbytes = manager.pool_nbytes
        self.frames_per_chunk = manager.frames_per_chunk
        self.demand = manager.demand
        self.demand_nbytes = manager.demand_nbytes
        self.can_host = manager.can_host

    def occupied(self, window: Window, committed: int, frames: int) -> Demand:
        """Pool objects while a chunk of `frames` frames is open after `committed` frames."""
        return stream_timeline(self.manager.config, window).demand(committed, frames)

    def by_format(self, demand: Demand) -> list[int]:
        """Pool bytes of unquantised pages, quantised pages and codebooks."""
        quantised = Demand(0, demand.quantised_pages, 0, demand.demoted_pages)
        parts = Demand(demand.dense_pages), quantised, Demand(0, 0, demand.codebooks)
        return [self.demand_nbytes(part) for part in parts]


class ParkingManagerCache(ManagerCache):
    """The same, and streams can be parked on the host and on disk.

    Args:
        manager: that has both.
        seconds_per_byte: of a transfer, for policies; the harness has a clock of its own.
    """

    def __init__(self, manager: KVCacheManager, seconds_per_byte: float = 1 / 20e9) -> None:
        super().__init__(manager)
        self.host_nbytes = int(manager.config.host_memory) + int(manager.config.disk_memory)
        self._pace = seconds_per_byte
        self.chunk_demand = self.occupied

    def park_seconds(self, nbytes: int) -> float:
        """Time to move that many bytes to the host."""
        return nbytes * self._pace

    def resume_seconds(self, nbytes: int) -> float:
        """Time to move them back."""
        return nbytes * self._pace


class LadderManagerCache(ParkingManagerCache):
    """The same, and streams can be stored more cheaply.

    Args:
        manager: that can do all that.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        super().__init__(manager)
        books = TieredCache(manager)
        self.demand, self.chunk_demand, self.lowered = books.demand, books.chunk_demand, books.lowered
        self.squeezed_demand = books.squeezed_demand


def make_cache(
    scenario: Scenario, geometry: Geometry, device: str, folder: Path, *, real: bool = False
) -> ManagerCache:
    """A manager whose pool holds as many streams as the scenario says, with room for parked ones if it wants any."""
    formats = _formats(scenario, real=real and torch.device(device).type == "cuda")
    fields: dict[str, Any] = {
        **formats, "span_frames": geometry.span_frames, "device": device, "staging": "256MiB" if real else "16MiB",
    }  # fmt: skip
    books = StaticCache(geometry, 1 << 42, fields["format"], fields["demote_to"])
    longest = books.demand_nbytes(books.demand(scenario.window, scenario.frames[1]))
    pool = int(longest * max(scenario.pool_streams, 1.5)) + 32 * books.layouts[0].page_nbytes
    roomy = Budget.split(geometry.model, CacheConfig(memory="4096GiB", **fields))
    memory = pool + roomy.staging + roomy.encode
    host = int(min(scenario.host_streams, 64.0) * longest)
    if scenario.can_park and host:
        fields |= {"host_memory": host, "disk_path": folder, "disk_memory": host + (64 << 20)}
    manager = KVCacheManager(geometry.model, CacheConfig(memory=memory + max(512 << 10, memory // 63), **fields))
    if not (scenario.can_park and host):
        return ManagerCache(manager)
    return LadderManagerCache(manager) if scenario.ladder else ParkingManagerCache(manager)
