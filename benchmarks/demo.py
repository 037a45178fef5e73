"""The demo: streams of a trained world model share one pool of 2-bit pages in less memory than half of them take.

Every stream walks out and back through a room of its own. The way out is given; the way back is generated, and what
it must show is in its history, which is read from quantised pages. The same streams are then generated from an
unquantised cache with the same noise, and compared.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import report
import results_file
import torch
from demo_results import PooledRun, StreamRun, demo_results
from torch import Tensor
from world_model.model import WorldModel, load_model
from world_streams import Shot, WorldEngine, WorldStream, fit_memory, generate, model_spec, return_shots

from qvg_paged import ArgumentError, CacheConfig, KVCacheManager, ModelSpec, Window
from qvg_paged.kernels.formats import get_format
from qvg_paged.scheduler import FCFS, Outcome, Reason, Scheduler, StreamRequest

__all__ = ["DemoOptions", "Progress", "run"]

WEIGHTS = Path(__file__).resolve().parent / "world_model" / "weights" / "world_model_v1.safetensors"
TENANTS = ("studio-a", "studio-b")
SPAN_FRAMES = 8


class Progress(Protocol):
    """Where the demo tells how far it is."""

    def phase(self, title: str, streams: Sequence[str], frames: int) -> None:
        """A part begins in which each of `streams` goes from 0 to `frames`."""
        ...

    def stream(self, name: str, frames: int, note: str) -> None:
        """A stream has so many frames; `note` says what it is doing."""
        ...


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What to run.

    Attributes:
        streams: how many, in turns of two tenants.
        given, generated: frames of each stream.
        format: of quantised pages.
        memory: budget of the manager, as in `CacheConfig`; None for the least that holds all streams at their worst.
        steps: Euler steps per generated frame.
        device: "cpu", "cuda"; None for CUDA if there is any.
        seed: names the noise.
        weights: safetensors file; None for those of the checkout.
        threads: of a CPU. Tensors are small: a second one gains little, and much is lost when the machine is busy.
        out: folder for the report.
    """

    streams: int = 4
    given: int = 24
    generated: int = 24
    format: str = "qvg4-int2"
    memory: str | None = None
    steps: int = 2
    device: str | None = None
    seed: int = 0
    weights: Path | None = None
    threads: int = 1
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        for name in ("streams", "given", "generated", "steps", "threads"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected >= 1, got {getattr(self, name)}")
        get_format(self.format)
        if self.device not in (None, "cpu", "cuda"):
            raise ArgumentError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ArgumentError("device: expected cpu, since torch finds no CUDA device, got cuda")
        if not self.weights_path.is_file():
            raise ArgumentError(f"weights: expected a safetensors file, got {self.weights_path}, which does not exist")

    @property
    def frames(self) -> int:
        """Frames of a stream."""
        return self.given + self.generated

    @property
    def weights_path(self) -> Path:
        """The weights in force."""
        return self.weights or WEIGHTS

    @property
    def torch_device(self) -> torch.device:
        """The device in force."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def span_frames(self) -> int:
        """Frames quantised together: fewer in short streams, so that most of their history is quantised too."""
        return max(1, min(SPAN_FRAMES, self.frames // 6))


def run(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    """Run the demo, write its files and return the content of ``result.json``.

    ``results`` holds `rows` (one per stream), `summary`, `series` and `checks`; the demo's promises held if all
    checks did.

    Raises:
        QvgPagedError: an option does not work; the message says what would.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _run(options, progress)
    finally:
        torch.set_num_threads(before)


def _run(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    begun = time.perf_counter()
    device = options.torch_device
    model = load_model(options.weights_path, device)
    shots = return_shots(
        options.streams,
        given=options.given,
        generated=options.generated,
        tenants=TENANTS,
        resolution=model.config.resolution,
        seed=options.seed,
        device=device,
    )
    spec = model_spec(model.config)
    config = _config(options, spec)
    progress.phase(
        f"{options.streams} streams, one pool of {options.format} pages, {config.memory:,} bytes for everything",
        [shot.id for shot in shots],
        options.frames,
    )
    pooled = _run_pooled(model, KVCacheManager(spec, config), shots, options, progress)
    pooled_seconds = time.perf_counter() - begun
    gc.collect()
    progress.phase("the same streams unquantised, same noise", [shot.id for shot in shots], options.frames)
    reference = _run_reference(model, spec, shots, options, progress)
    results = demo_results(config, options.frames * spec.frame_nbytes, shots, pooled, reference)
    results["summary"] |= {"pooled_seconds": pooled_seconds, "seconds": time.perf_counter() - begun}
    content = results_file.result(device=device, config={**vars(options), "span_frames": options.span_frames,
                                  "weights": options.weights_path.name}, results=results)  # fmt: skip
    videos = {name: torch.stack(stream.video).cpu() for name, stream in pooled.streams.items() if stream.video}
    report.write(options.out, content, [
        report.Strip(shot.id, shot.tenant, shot.given, shot.truth.cpu(), reference[shot.id].cpu(), videos[shot.id])
        for shot in shots if pooled.books[shot.id].finished
    ])  # fmt: skip
    results_file.write(options.out / "result.json", content)
    return content


def _config(options: DemoOptions, spec: ModelSpec) -> CacheConfig:
    config = CacheConfig(
        memory=options.memory or "1024GiB",
        format=options.format,
        span_frames=options.span_frames,
        device=options.torch_device,
    )
    if options.memory is not None:
        return config
    return fit_memory(spec, config, _window(options), frames=options.frames, streams=options.streams)


def _window(options: DemoOptions) -> Window:
    return Window(recent_frames=options.frames)


def _run_pooled(
    model: WorldModel, cache: KVCacheManager, shots: Sequence[Shot], options: DemoOptions, progress: Progress
) -> PooledRun:
    """All streams from one pool, as the scheduler says."""
    engine = WorldEngine(model, cache, steps=options.steps)
    scheduler = Scheduler(cache, FCFS())
    by_id = {shot.id: shot for shot in shots}
    result = PooledRun(books={shot.id: StreamRun() for shot in shots})
    dense_frame = cache.layouts[0].page_nbytes
    for shot in shots:
        scheduler.submit(StreamRequest(shot.id, tenant=shot.tenant, frames=shot.frames, window=_window(options)))
    while scheduler.busy:
        plan = scheduler.step(time.monotonic())
        for decision in plan.finished:
            result.books[decision.stream_id].finished = decision.reason is Reason.COMPLETED
            result.books[decision.stream_id].decision = decision.text
            result.streams[decision.stream_id].stream.close()
        for decision in plan.rejected:
            result.books[decision.stream_id].decision = decision.text
            progress.stream(decision.stream_id, 0, "refused")
        for decision in plan.waiting:
            result.books[decision.stream_id].waits += 1
            progress.stream(decision.stream_id, 0, decision.reason.value)
        for decision in plan.admitted:
            result.streams[decision.stream_id] = engine.open(by_id[decision.stream_id], _window(options))
        moving = [result.streams[decision.stream_id] for decision in plan.running]
        if not moving:
            continue
        engine.advance(moving)
        _keep_books(result, cache, moving, dense_frame, progress)
        scheduler.update(plan, Outcome(committed={stream.shot.id: 1 for stream in moving}))
    cache.check_integrity()
    result.stats = cache.stats()
    return result


def _keep_books(
    result: PooledRun, cache: KVCacheManager, moving: Sequence[WorldStream], dense_frame: int, progress: Progress
) -> None:
    stats = cache.stats()
    result.resident = max(result.resident, len(stats.streams))
    result.used_nbytes.append(sum(stats.tenant_nbytes.values()))
    result.dense_nbytes.append(dense_frame * sum(stream.committed for stream in stats.streams.values()))
    for stream in moving:
        books = result.books[stream.shot.id]
        books.nbytes = stats.streams[stream.shot.id].nbytes
        if stream.frame <= stream.shot.given:
            books.started = time.perf_counter()
        books.seconds = time.perf_counter() - books.started
        share = stats.streams[stream.shot.id].quantised_frames / stream.frame
        progress.stream(stream.shot.id, stream.frame, f"{_doing(stream)}, {share:.0%} quantised")


def _doing(stream: WorldStream) -> str:
    return "generated" if stream.frame > stream.shot.given else "given"


def _run_reference(
    model: WorldModel, spec: ModelSpec, shots: Sequence[Shot], options: DemoOptions, progress: Progress
) -> dict[str, Tensor]:
    """Every stream from an unquantised cache with room for all: ``[frames, 3, resolution, resolution]`` by id."""
    config = CacheConfig(memory="1024GiB", format="dense", device=options.torch_device)
    config = fit_memory(spec, config, _window(options), frames=options.frames, streams=len(shots))

    def on_chunk(streams: Sequence[WorldStream]) -> None:
        for stream in streams:
            progress.stream(stream.shot.id, stream.frame, _doing(stream))

    streams = generate(
        model, KVCacheManager(spec, config), shots, window=_window(options), steps=options.steps, on_chunk=on_chunk
    )
    return {stream.shot.id: torch.stack(stream.video) for stream in streams}
