"""Closed-loop evaluation: the same videos generated from an unquantised cache and from every format.

A trained world model walks out and back. The way out is given; the way back is generated from the cache alone, with
the same noise for every cache. Compared are the generated frames with those of the unquantised cache, and with the
renderer's truth.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from eval_rows import CONTROLS, FORMAT_ROWS, Row
from torch import Tensor
from world_model.evaluate import psnr, ssim
from world_model.model import WorldModel, load_model
from world_model.outliers import with_key_outliers
from world_streams import Shot, generate, model_spec, return_shots

from qvg_paged import AttentionPath, CacheConfig, ConfigError, KVCacheManager, ModelSpec, PageFormat, Timeline, Window
from qvg_paged.budget import object_counts, page_layouts
from qvg_paged.kernels.formats import DENSE
from qvg_paged.kernels.layout import PageLayout

__all__ = ["EvalOptions", "bits_per_element", "run", "same_bytes_window"]

MAX_PSNR = 100.0


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate.

    Attributes:
        weights: safetensors file of the world model.
        device: "cpu" or "cuda".
        worlds: held-out paths.
        given: frames of the way out.
        seed: names the noise.
        world_seed: names worlds and paths.
        steps: Euler steps per frame.
        span_frames: frames quantised together.
        same_bytes_span_frames: the same, in the comparison with a window of the same bytes.
        num_centroids: centroids per span, or None for the library's rule.
        variants: "plain" and "outliers" (keys with outlier channels; the same function).
        only: names of rows to run; empty for all.
        same_bytes: name of the row that is compared with an unquantised window of the same bytes; None for none.
        memory: budget of the manager under test.
        path: how attention reads pages, in rows that do not say so themselves.
    """

    weights: Path
    device: str = "cpu"
    worlds: int = 24
    given: int = 32
    seed: int = 0
    world_seed: int = 7
    steps: int = 4
    span_frames: int = 16
    same_bytes_span_frames: int = 8
    num_centroids: int | None = None
    variants: tuple[str, ...] = ("plain", "outliers")
    only: tuple[str, ...] = ()
    same_bytes: str | None = "qvg4-int2"
    memory: str = "6GiB"
    path: AttentionPath = AttentionPath.AUTO


def bits_per_element(layout: PageLayout, span_frames: int) -> float:
    """Stored bits per number of a closed span, codebooks, scales, ids and balancing included."""
    stored = span_frames * layout.page_payload_nbytes + layout.codebook_payload_nbytes
    part = layout.key
    elements = 2 * layout.num_layers * span_frames * part.tokens * part.heads * part.head_dim
    return 8 * stored / elements


@dataclass(frozen=True)
class _Bench:
    """A model, its paths, and how to run a row on them."""

    model: WorldModel
    shots: list[Shot]
    options: EvalOptions

    @property
    def truth(self) -> Tensor:
        """The generated half as the renderer sees it, ``[worlds, given, 3, resolution, resolution]``."""
        return torch.stack([shot.truth[shot.given :] for shot in self.shots])

    @property
    def spec(self) -> ModelSpec:
        """The model's cache."""
        return model_spec(self.model.config)

    def config(self, fmt: PageFormat, path: AttentionPath | None = None, span_frames: int | None = None) -> CacheConfig:
        options = self.options
        if options.num_centroids is not None:
            fmt = fmt.with_codecs(num_centroids=options.num_centroids)
        return CacheConfig(
            memory=options.memory,
            format=fmt,
            span_frames=span_frames or options.span_frames,
            device=options.device,
            path=path or options.path,
        )

    def videos(self, row: Row, span_frames: int | None = None) -> Tensor:
        """The generated half, ``[worlds, given, 3, resolution, resolution]``."""
        cache = KVCacheManager(self.spec, self.config(row.format, row.path, span_frames))
        shots = [replace(shot, seed=shot.seed + row.noise) for shot in self.shots]
        window = None if row.window is None else Window(recent_frames=row.window)
        streams = generate(self.model, cache, shots, window=window, steps=self.options.steps)
        return torch.stack([torch.stack(stream.video[self.options.given :]) for stream in streams])

    def bits(self, row: Row) -> float:
        layouts = page_layouts(self.spec, self.config(row.format))
        return bits_per_element(layouts[-1], self.options.span_frames)

    def compare(self, video: Tensor, dense: Tensor) -> dict[str, Any]:
        """Onset, mean and curve against the unquantised cache, and the same against truth."""
        truth = self.truth
        result: dict[str, Any] = {}
        for name, other in (("dense", dense), ("truth", truth)):
            curve = psnr(video, other).clamp_max(MAX_PSNR).mean(0)
            result[name] = {
                "first": curve[0].item(),
                "mean": curve.mean().item(),
                "last": curve[-1].item(),
                "ssim": ssim(video, other).mean().item(),
                "curve": [round(x, 3) for x in curve.tolist()],
            }
        return result


def same_bytes_window(model: ModelSpec, config: CacheConfig, frames: int) -> tuple[int, int]:
    """Peak bytes of a stream that keeps `frames` frames in `config`, and the unquantised window as dear.

    The peak counts pages, codebooks, the unquantised tail, the open chunk and the pages reserved for a closing span.
    The window is rounded up: it never gets fewer bytes.
    """
    layouts = page_layouts(model, config)
    timeline = Timeline(Window(recent_frames=frames), config.span_frames)
    peak = max(
        sum(size * count for size, count in object_counts(layouts, timeline.demand(n, 1)).items())
        for n in range(frames)
    )
    return peak, -(-peak // layouts[0].page_nbytes) - 1


def _same_bytes(bench: _Bench, dense: Tensor, row: Row) -> dict[str, Any]:
    options, truth = bench.options, bench.truth
    frames, span = 2 * options.given, options.same_bytes_span_frames
    peak, window = same_bytes_window(bench.spec, bench.config(row.format, span_frames=span), frames)
    full = bench.videos(row, span)
    windowed = bench.videos(Row(name="window", format=DENSE, window=window))
    # generated frame i shows again what frame `frames - 1 - i` showed; that one has left a window of w frames if
    outside = [i for i in range(options.given, frames) if frames - 1 - i < i - window]
    pick = [i - options.given for i in outside]
    scores = {
        name: {
            "truth": psnr(video[:, pick], truth[:, pick]).mean().item(),
            "dense": psnr(video[:, pick], dense[:, pick]).clamp_max(MAX_PSNR).mean().item(),
        }
        for name, video in (("quantised", full), ("window", windowed), ("unquantised", dense))
    }
    return {
        "format": row.name,
        "span_frames": span,
        "peak_nbytes": peak,
        "window_frames": window,
        "revisited_frames": len(outside),
        "scores": scores,
        "gain_truth": scores["quantised"]["truth"] - scores["window"]["truth"],
        "gain_dense": scores["quantised"]["dense"] - scores["window"]["dense"],
    }


def run(
    options: EvalOptions,
    progress: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the evaluation; ``results`` of a result file: per variant the rows and the comparison at the same bytes.

    `save` is called with what there is after every row.
    """
    results: dict[str, Any] = {}
    for variant in options.variants:
        model = load_model(options.weights, options.device)
        if variant == "outliers":
            model.load_state_dict(with_key_outliers(model.state_dict(), model.config))
        shots = return_shots(
            options.worlds,
            given=options.given,
            generated=options.given,
            resolution=model.config.resolution,
            seed=options.seed,
            world_seed=options.world_seed,
            device=options.device,
        )
        for outcome in _run_variant(_Bench(model, shots, options), progress, variant):
            results[variant] = outcome
            save(results)
    return results


def _run_variant(bench: _Bench, progress: Callable[[str], None], variant: str) -> Iterator[dict[str, Any]]:
    """The outcome so far, after every row."""
    options = bench.options
    ours = None if options.same_bytes is None else _row(options.same_bytes)
    base = Row(name="unquantised, all history", format=DENSE)
    dense = bench.videos(base)
    rows = [{"name": base.name, "bits": bench.bits(base), **bench.compare(dense, dense)}]
    last = torch.stack([shot.truth[shot.given - 1 :][:1] for shot in bench.shots]).expand_as(dense)
    rows.append({"name": "copy last frame", "bits": None, **bench.compare(last, dense)})
    wanted = [row for row in (*CONTROLS, *FORMAT_ROWS) if not options.only or row.name in options.only]
    for row in wanted:
        start = time.perf_counter()
        video = bench.videos(row)
        scores = {"name": row.name, "bits": bench.bits(row), **bench.compare(video, dense)}
        rows.append({**scores, "seconds": round(time.perf_counter() - start, 2)})
        progress(
            f"{variant:9s} {row.name:36s} {scores['bits']:6.3f} bits   vs unquantised {scores['dense']['first']:6.2f} "
            f"{scores['dense']['mean']:6.2f} dB   vs truth {scores['truth']['mean']:6.2f} dB   "
            f"{time.perf_counter() - start:5.1f} s"
        )
        yield {"rows": rows, "same_bytes": None, "options": _plain(options)}
    same = None if ours is None else _same_bytes(bench, dense, ours)
    yield {"rows": rows, "same_bytes": same, "options": _plain(options)}


def _row(name: str) -> Row:
    """The row of this name."""
    rows = {row.name: row for row in FORMAT_ROWS}
    if name not in rows:
        raise ConfigError(f"same_bytes: expected one of {', '.join(rows)}, got {name!r}")
    return rows[name]


def _plain(options: EvalOptions) -> dict[str, Any]:
    return {name: value.name if isinstance(value, Path) else value for name, value in asdict(options).items()}
