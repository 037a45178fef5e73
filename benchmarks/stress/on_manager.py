"""The workloads of the simulator on the real cache: pages are written, encoded, parked, damaged and read back.

Time is that of the simulator, so that a seed decides the same on every machine; the work is real. K and V are noise
that names its stream and frame, at the model's chunk, span and window lengths. Faults break the store where it hurts:
each must raise the right error and leave everything else as it was.
"""

import errno
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from qvg_paged import (
    CorruptedError,
    NonFiniteError,
    OutOfMemoryError,
    StateError,
    StorageError,
    Stream,
)
from qvg_paged.events import inject_fault
from qvg_paged.park import Tier
from qvg_paged.scheduler import Plan
from qvg_paged.timeline import Demand
from stress.faults import RESUMING
from stress.models import MODELS, Geometry
from stress.real_cache import ManagerCache, make_cache, reduced
from stress.run import Run
from stress.scenario import Scenario
from stress.simulator import Simulator

__all__ = ["ManagerRun", "run_on_manager"]

CHUNK_POINTS: dict[str, tuple[str, type[Exception]]] = {
    "out of memory": ("pool.allocate", OutOfMemoryError),
    "chunk fails": ("chunk.write", RuntimeError),
    "encoding fails": ("encode.publish", RuntimeError),
    "stream fails": ("commit.check", RuntimeError),
}
"""Where the store is broken for a fault of a chunk, and what it raises."""
PARK_POINTS: dict[str, tuple[str, Exception]] = {
    "park fails": ("park.publish", RuntimeError("device lost")),
    "disk full": ("disk.write", OSError(errno.ENOSPC, "no space left on device")),
}
CHECK_EVERY = 16


class ManagerRun(Simulator):
    """A run that does the work.

    Args:
        scenario, seed: as of a simulated run.
        device: of the cache.
        folder: for parked streams.
        real: whether the geometry keeps all layers, heads and tokens.
    """

    cache: ManagerCache

    def __init__(self, scenario: Scenario, seed: int, device: str, folder: Path, *, real: bool = False) -> None:
        self._device, self._folder, self._real = device, folder, real
        self._streams: dict[str, Stream] = {}
        self._parked: dict[str, dict[int, int]] = {}
        self._own = Random(f"manager {seed}")
        super().__init__(replace(scenario, varied=False), seed)
        self._noise = torch.Generator(device).manual_seed(seed)
        self.manager = self.cache.manager

    def _make_cache(self) -> ManagerCache:  # type: ignore[override]
        self.geometry = self._geometry(MODELS[self.scenario.model])
        return make_cache(self.scenario, self.geometry, self._device, self._folder, real=self._real)

    def _reserve(self) -> Demand:
        return self.cache.manager.budget.reserve

    def _geometry(self, geometry: Geometry) -> Geometry:
        """What the streams' pages are made of."""
        return geometry if self._real else reduced(geometry)

    def _close(self, name: str) -> None:
        super()._close(name)
        stream = self._streams.pop(name, None)
        self._parked.pop(name, None)
        if stream is not None:
            stream.close()
            stream.close()  # a second time changes nothing
            self._must_raise(StateError, lambda: stream.begin_chunk(1))

    def _move(self, plan: Plan) -> float:
        for decision in plan.parked:
            self._park(decision.stream_id, self.faults.broken.get(decision.stream_id, ""))
        for decision in plan.resumed:
            self._resume(decision.stream_id, self.faults.broken.get(decision.stream_id, ""))
        for decision in plan.admitted:
            request = self.requests[decision.stream_id]
            self._streams[request.id] = self.manager.open(request.id, tenant=request.tenant, window=request.window)
        return super()._move(plan)

    def _squeeze(self, plan: Plan) -> float:
        for decision in (*plan.demoted, *plan.shrunk):
            stream, now = self._streams[decision.stream_id], decision.squeeze
            assert now is not None
            if now.rung > stream.rung:
                stream.demote(now.rung)
            if now.retrieval_frames is not None and now.retrieval_frames < stream.window.retrieval_frames:
                stream.shrink_retrieval(now.retrieval_frames)
        seconds = super()._squeeze(plan)
        for decision in (*plan.demoted, *plan.shrunk):
            stream = self._streams[decision.stream_id]
            frames = min(self.cache.frames_per_chunk, self.requests[stream.id].frames - stream.committed)
            held = stream.timeline.demand(stream.committed, frames)
            assert held == self._demand(stream.id), f"{stream.id} holds {held}, the books say {self._demand(stream.id)}"
        return seconds

    def _park(self, name: str, fault: str) -> None:
        stream = self._streams[name]
        digests = stream.digests()
        damage_ahead = any(fault in self.scenario.faults for fault in RESUMING)
        tier = Tier.DISK if damage_ahead or fault == "disk full" or self._own.random() < 0.25 else Tier.HOST
        if fault not in PARK_POINTS:
            stream.park(tier)
            self._parked[name] = digests
            return
        point, error = PARK_POINTS[fault]
        with inject_fault(point, error):
            kinds = (StorageError, OutOfMemoryError, type(error))
            self._must_raise(kinds, lambda: stream.park(tier))
        assert stream.digests() == digests, f"{name} changed although it could not be parked"

    def _resume(self, name: str, fault: str) -> None:
        stream = self._streams[name]
        if fault in RESUMING and stream.parked is not None and stream.parked.disk is not None:
            self._damage(stream, fault)
            return
        stream.resume()
        assert stream.digests() == self._parked.pop(name), f"{name} came back different"

    def _damage(self, stream: Stream, fault: str) -> None:
        """Break the only copy; the store must notice."""
        assert stream.parked is not None
        assert stream.parked.disk is not None
        path = stream.parked.disk.path
        if fault == "disk fails":
            with inject_fault("disk.read", OSError(errno.EIO, "input/output error")):
                self._must_raise((StorageError, CorruptedError), stream.resume)
            return
        content = bytearray(path.read_bytes())
        if fault == "file truncated":
            del content[self._own.randrange(len(content)) :]
        else:
            content[self._own.randrange(stream.parked.disk.data_start, len(content))] ^= 1 << self._own.randrange(8)
        path.write_bytes(content)
        self._must_raise((CorruptedError, StorageError), stream.resume)

    def _generate(self, plan: Plan) -> None:
        for decision in plan.running:
            fault = self.faults.broken.get(decision.stream_id, "")
            if fault not in RESUMING:
                self._chunk(self._streams[decision.stream_id], len(decision.frames or ()), fault)
        self._check(plan)

    def _check(self, plan: Plan) -> None:
        if plan.step % CHECK_EVERY == 0:
            self.manager.check_integrity()

    def _chunk(self, stream: Stream, frames: int, fault: str) -> None:
        before = stream.committed
        if fault == "nan":
            self._must_raise(NonFiniteError, lambda: self._write(stream, frames, nan=True))
        elif fault in CHUNK_POINTS:
            self._break_chunk(stream, frames, *CHUNK_POINTS[fault])
        else:
            self._write(stream, frames)
            before += frames
        assert stream.committed == before, f"{stream.id}: {stream.committed} frames are committed, expected {before}"

    def _break_chunk(self, stream: Stream, frames: int, point: str, kind: type[Exception]) -> None:
        """Fail at the point if the chunk passes it, else at its beginning."""
        error = kind("injected", 1, 0) if kind is OutOfMemoryError else kind("injected")
        digests = stream.digests()
        with inject_fault(point, error) as seen:
            try:
                chunk = stream.begin_chunk(frames)
                self._fill(stream, frames, nan=False)
                if point == "encode.publish" and not self._closes_span(stream, frames):
                    chunk.abort()
                else:
                    chunk.commit()
            except kind:
                if stream.chunk is not None:
                    stream.chunk.abort()
        assert seen[0] or point == "encode.publish", f"{point} was not passed"
        assert stream.digests() == digests, f"{stream.id} changed although its chunk failed"

    def _closes_span(self, stream: Stream, frames: int) -> bool:
        timeline = stream.timeline
        return timeline.closed_spans(stream.committed + frames) > timeline.closed_spans(stream.committed)

    def _write(self, stream: Stream, frames: int, *, nan: bool = False) -> None:
        with stream.begin_chunk(frames) as chunk:
            self._fill(stream, frames, nan=nan)
            chunk.commit()

    def _fill(self, stream: Stream, frames: int, *, nan: bool) -> None:
        model = self.geometry.model
        shape = (2, frames * model.tokens_per_frame, model.num_kv_heads, model.head_dim)
        assert stream.chunk is not None
        for layer in range(model.num_layers):
            kv = torch.randn(shape, generator=self._noise, device=self._device).to(model.dtype)
            if nan and layer == model.num_layers - 1:
                kv[1, -1, 0, 0] = torch.nan
            stream.chunk.write(layer, kv[0], kv[1])

    @staticmethod
    def _must_raise(kinds: type[Exception] | tuple[type[Exception], ...], call: Callable[[], object]) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError(f"expected {kinds}, and nothing was raised")

    def run(self) -> Run:
        """Until everything has drained; then the cache must be empty."""
        result = super().run()
        self.manager.check_integrity()
        left = sum(self.manager.stats().tenant_nbytes.values())
        if result.drained:
            assert not self.manager.streams, f"streams are left in the cache: {sorted(self.manager.streams)}"
            assert left == 0, f"{left} bytes are left in the pool"
        return result


def run_on_manager(scenario: Scenario, seed: int, device: str, *, real: bool = False) -> Run:
    """Run it on a cache of its own; the model ``world-model`` generates what the streams of others make up.

    Raises:
        AssertionError, QvgPagedError: the store did something that it must not.
    """
    with tempfile.TemporaryDirectory(prefix="qvg-stress-") as folder:
        if scenario.model == "world-model":
            from stress.world_run import WorldRun  # noqa: PLC0415 - needs what generates, and knows this module

            return WorldRun(scenario, seed, device, Path(folder)).run()
        return ManagerRun(scenario, seed, device, Path(folder), real=real).run()
