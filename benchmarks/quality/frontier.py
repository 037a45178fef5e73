"""The frontier: stored bits against closed-loop quality, for published codecs, the library's formats and candidates.

Every row is run on every model and variant, several rows in a batch and several batches in processes of their own.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from world_model.model import WorldModel, load_model

from quality.attention_error import attention_error
from quality.judge import judge
from quality.loop import Cache, CodedHistory, generate
from quality.outliers import with_contrast
from quality.paths import Paths, revisit_paths
from quality.row import REAL_GEOMETRIES, Row
from quality.rows import rows_named

__all__ = ["VARIANTS", "Found", "FrontierOptions", "run", "run_all"]

VARIANTS: dict[str, float | None] = {"plain": None, "9x": 9.0, "13x": 13.0, "150x": 150.0}
"""Contrast of the keys' outlier channels; None leaves the model as trained."""


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """What to run.

    Attributes:
        weights: safetensors files of world models.
        device: "cpu" or "cuda".
        paths: held-out camera paths, a third of each kind.
        given: given frames; as many are generated.
        steps: Euler steps per frame.
        span_frames: frames quantised together.
        variants: keys of `VARIANTS`.
        rows: names of rows, or of sets of rows (`rows.SETS`), for the model as trained.
        outlier_rows: the same for the other variants, which run on half of the paths.
        without: rows to leave out.
        first: run rows on so many of the paths only; None for all.
        rows_at_once: rows in one batch.
        jobs: processes.
        seconds: no batch is begun after so long; its rows are not in the results.
    """

    weights: tuple[Path, ...]
    device: str = "cpu"
    paths: int = 96
    given: int = 32
    steps: int = 4
    span_frames: int = 16
    variants: tuple[str, ...] = ("plain",)
    rows: tuple[str, ...] = ("frontier",)
    outlier_rows: tuple[str, ...] = ("outliers",)
    without: tuple[str, ...] = ()
    first: int | None = None
    rows_at_once: int = 3
    jobs: int = 1
    seconds: float = 3600.0


@dataclass
class _Base:
    """A model, its paths, and its unquantised run."""

    model: WorldModel
    paths: Paths
    history: CodedHistory
    dense: Tensor


@dataclass(frozen=True)
class _Task:
    options: FrontierOptions
    weights: Path
    variant: str
    rows: tuple[str, ...]
    deadline: float


OUT_OF_TIME = "out of time"
BASES_KEPT = 3
_bases: dict[tuple[Path, str, int], _Base] = {}


def _base(options: FrontierOptions, weights: Path, variant: str) -> _Base:
    """The unquantised run, made once in a process for each model and variant (the last few are kept)."""
    key = (weights, variant, options.paths)
    if key not in _bases:
        while len(_bases) >= BASES_KEPT:
            _bases.pop(next(iter(_bases)))
        model = load_model(weights, options.device)
        side, device = model.config.resolution, options.device
        paths = revisit_paths(options.paths, given=options.given, resolution=side, device=device)
        contrast = VARIANTS[variant]
        if contrast is not None:
            model.load_state_dict(with_contrast(model, paths, contrast))
        step = max(1, options.given // 4)
        watched = range(options.given, 2 * options.given, step)
        frames = 2 * options.given
        history = CodedHistory(model, [Cache()], len(paths), frames, options.span_frames, watched=watched, keep=True)
        dense = generate(model, paths, history, steps=options.steps)[0]
        history.trim(options.given)
        _bases[key] = _Base(model, paths, history, dense)
    base = _bases[key]
    some = options.first
    return base if some is None else replace(
        base, paths=base.paths.first(some), history=base.history.first(some), dense=base.dense[:some]
    )  # fmt: skip


def _run_task(task: _Task) -> list[dict[str, Any]]:
    """Scores of the rows of one batch; of a batch that fails, of each row alone; those that fail then say why."""
    if time.time() > task.deadline:
        return [{"name": name, "skipped": OUT_OF_TIME} for name in task.rows]
    torch.set_num_threads(1 if task.options.jobs > 1 else torch.get_num_threads())
    try:
        return _run_rows(task)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = f"{error}\n{traceback.format_exc()[-1500:]}"
    if task.options.device == "cuda":
        torch.cuda.empty_cache()
    if len(task.rows) == 1:
        return [{"name": task.rows[0], "skipped": reason}]
    return [row for name in task.rows for row in _run_task(replace(task, rows=(name,)))]


def _run_rows(task: _Task) -> list[dict[str, Any]]:
    options, rows, began = task.options, rows_named(task.rows), time.perf_counter()
    base = _base(options, task.weights, task.variant)
    caches = [row.cache for row in rows]
    history = CodedHistory(base.model, caches, len(base.paths), 2 * options.given, options.span_frames)
    videos = generate(base.model, base.paths, history, steps=options.steps)
    del history
    scores = [_scores(base, row, video, options) for row, video in zip(rows, videos, strict=True)]
    seconds = round((time.perf_counter() - began) / len(rows), 2)
    return [{**score, "seconds": seconds} for score in scores]


def _scores(base: _Base, row: Row, video: Tensor, options: FrontierOptions) -> dict[str, Any]:
    history = base.history
    error = attention_error(history, row.cache.key, row.cache.value, options.given)
    tokens = options.span_frames * history.tokens
    return {
        "name": row.name,
        "group": row.group,
        "paths": len(base.paths),
        "bits": row.bits(tokens, history.dim, 2 * options.given),
        "real_bits": {name: row.real_bits(name, tokens) for name in REAL_GEOMETRIES},
        "centroid_tokens": row.tokens_per_centroid(tokens),
        **judge(video, base.dense, base.paths),
        "attention": error.as_dict(),
    }


def _tasks(options: FrontierOptions) -> list[_Task]:
    deadline = time.time() + options.seconds
    tasks = []
    for weights in options.weights:
        for variant in options.variants:
            mine = _for(options, variant)
            rows = [row for row in rows_named(mine.rows) if row.name not in mine.without]
            rows.sort(key=lambda row: row.batch)
            for _, alike in groupby(rows, key=lambda row: row.batch):
                names = [row.name for row in alike]
                for first in range(0, len(names), options.rows_at_once):
                    some = tuple(names[first : first + options.rows_at_once])
                    tasks.append(_Task(mine, weights, variant, some, deadline))
    return tasks


def _for(options: FrontierOptions, variant: str) -> FrontierOptions:
    """The options of one variant."""
    if VARIANTS[variant] is None:
        return options
    return replace(options, rows=options.outlier_rows, paths=max(1, options.paths // 2))


Found = dict[str, dict[str, list[dict[str, Any]]]]


def run(
    options: FrontierOptions,
    progress: Callable[[str], None] = print,
    save: Callable[[Found], None] = lambda _: None,
) -> Found:
    """``{model: {variant: [row, ...]}}``, rows in the order of `rows.SETS`."""
    return run_all([options], progress, save)


def run_all(
    plan: Sequence[FrontierOptions],
    progress: Callable[[str], None] = print,
    save: Callable[[Found], None] = lambda _: None,
) -> Found:
    """Several sets of options, one after the other; the first says how many processes work on them all.

    `save` is called with what there is after every batch.
    """
    found: Found = {}
    tasks = [task for options in plan for task in _tasks(options)]
    for task, scores in _work(tasks, plan[0].jobs):
        mine = found.setdefault(task.weights.stem, {}).setdefault(task.variant, [])
        mine.extend(row for row in scores if row.get("skipped") != OUT_OF_TIME)
        for row in scores:
            progress(_line(task, row))
        save(_ordered(found))
    return _ordered(found)


def _ordered(found: Found) -> Found:
    order = {row.name: place for place, row in enumerate(rows_named(("frontier", "all")))}
    return {
        model: {variant: sorted(rows, key=lambda row: order[row["name"]]) for variant, rows in variants.items()}
        for model, variants in found.items()
    }


def _work(tasks: Sequence[_Task], jobs: int) -> Any:
    if jobs == 1:
        yield from ((task, _run_task(task)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending = {pool.submit(_run_task, task): task for task in tasks}
        for done in as_completed(pending):
            yield pending[done], done.result()


def _line(task: _Task, row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{task.weights.stem} {task.variant} {row['name']}: {row['skipped']}"
    d, t, a = row["dense"], row["truth"], row["attention"]
    return (
        f"{task.weights.stem[-5:]} {task.variant:5s} {row['name']:44s} {row['bits']:6.3f} b | dense "
        f"{d['onset']:6.2f} {d['short']:6.2f} {d['long']:6.2f} {d['mean']:6.2f} {d['ssim']:.4f} {d['gmsd']:.4f} "
        f"| truth {t['mean']:6.2f} | K {a['key']:.3f} V {a['value']:.3f} out {a['output']:.4f} "
        f"top {a['top_key_changes']:.4f} | {row['seconds']:.1f} s"
    )
