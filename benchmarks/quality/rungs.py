"""What the rungs of the ladder cost in pictures: streams squeezed while they generate, on the paged cache itself.

    python benchmarks/quality/rungs.py --weights world_model_v1.safetensors --json rungs.json

Streams walk out and back as in ``qvg-paged eval``. At a given frame all are demoted, or their retrieval memory shrinks;
the frames from then on are compared with those of the unquantised cache. The result file is written anew after every
row.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from world_model.evaluate import psnr, ssim
from world_model.model import WorldModel, load_model
from world_streams import Shot, WorldEngine, WorldStream, model_spec, return_shots

from quality.metrics import paired_interval
from qvg_paged import FORMATS, CacheConfig, Grid, KVCacheManager, PageFormat, Rung, ScaleRule, Window
from qvg_paged.kernels.formats import DENSE

__all__ = ["ROWS", "Squeezed", "run"]

MAX_PSNR = 100.0
NEIGHBOURS = 2
"""Frames retrieved on either side of the one that is shown again."""
RECENT = 8
"""Frames visible without retrieval, in rows with a retrieval memory."""


@dataclass(frozen=True, kw_only=True)
class Squeezed:
    """One way to store streams and to squeeze them.

    Attributes:
        name: as printed.
        format: of closed spans.
        demote_to: format of `Rung.SPANS`.
        rung: how far all streams are demoted.
        late: whether half of the frames are generated before that, or none.
        retrieval: frames kept past `RECENT` visible ones, of which the engine retrieves those around the frame that is
            shown again; None for all history visible.
        shrunk: frames of retrieval memory left then.
    """

    name: str
    format: PageFormat
    demote_to: PageFormat | None = None
    rung: Rung = Rung.NONE
    late: bool = False
    retrieval: int | None = None
    shrunk: int | None = None

    def start(self, generated: int) -> int:
        """The generated frame from which on it holds, of `generated` ones."""
        return generated // 2 if self.late else 0


def two_bits(fmt: PageFormat) -> PageFormat:
    """`fmt` with four levels, under the same codebooks."""
    codecs = {
        part: replace(codec, grid=Grid.QUATERNARY, scale_rule=ScaleRule.SEARCH)
        for part, codec in (("key", fmt.key), ("value", fmt.value))
    }
    return replace(fmt, name=f"{fmt.name} in 2 bits", **codecs)


def _rows() -> Iterator[Squeezed]:
    yield Squeezed(name="unquantised", format=DENSE)
    for fmt in (FORMATS["qvg-int4"], FORMATS["near-lossless"]):
        lower = two_bits(fmt)
        base = Squeezed(name=fmt.name, format=fmt, demote_to=lower)
        yield replace(base, name=f"{fmt.name}, dense tail")
        yield replace(base, name=f"{fmt.name}, no dense tail from the turn on", rung=Rung.TAIL)
        yield replace(base, name=f"{fmt.name}, 2 bits from the turn on", rung=Rung.SPANS)
        yield replace(base, name=f"{fmt.name}, 2 bits from half of the way back on", rung=Rung.SPANS, late=True)
        yield Squeezed(name=f"{lower.name} from the start, dense tail", format=lower)
    base = Squeezed(name="best-2bit", format=FORMATS["best-2bit"], retrieval=56)
    yield replace(base, name="best-2bit, 8 recent frames and 56 to retrieve from")
    yield replace(base, name="best-2bit, 24 left to retrieve from", shrunk=24)
    yield replace(base, name="best-2bit, 8 left to retrieve from", shrunk=8)


ROWS = tuple(_rows())


@dataclass(frozen=True)
class _Stage:
    """A model, its shots, and how they are run."""

    model: WorldModel
    shots: list[Shot]
    arguments: argparse.Namespace

    def run(self, row: Squeezed) -> dict[str, Any]:
        """The generated half under "video", bytes that squeezing returned, and how the frames are stored at the end."""
        arguments = self.arguments
        config = CacheConfig(
            memory=arguments.memory, format=row.format, demote_to=row.demote_to, device=arguments.device,
            span_frames=arguments.span_frames,
        )  # fmt: skip
        cache = KVCacheManager(model_spec(self.model.config), config)
        engine = WorldEngine(self.model, cache, steps=arguments.steps)
        window = Window(recent_frames=2 * arguments.given)
        if row.retrieval is not None:
            window = Window(recent_frames=RECENT, retrieval_frames=row.retrieval)
        streams = [engine.open(shot, window) for shot in self.shots]
        freed = 0
        while not streams[0].done:
            frame = streams[0].frame
            if frame == arguments.given + row.start(arguments.given):
                freed = _squeeze(cache, streams, row)
            engine.advance(streams, () if row.retrieval is None else _wanted(streams[0], frame))
        bits = [quality.bits for quality in streams[0].stream.ledger.values()]
        for stream in streams:
            stream.stream.close()
        video = torch.stack([torch.stack(stream.video[arguments.given :]) for stream in streams])
        return {"video": video, "freed_nbytes": freed // len(streams), "frames": len(bits), "bits": _mean(bits)}


def _squeeze(cache: KVCacheManager, streams: Sequence[WorldStream], row: Squeezed) -> int:
    """Bytes that went back to the pool."""
    freed = cache.demote([stream.stream for stream in streams], row.rung) if row.rung is not Rung.NONE else 0
    if row.shrunk is not None:
        freed += sum(stream.stream.shrink_retrieval(row.shrunk) for stream in streams)
    return freed


def _wanted(stream: WorldStream, frame: int) -> list[int]:
    """Stored frames around the one that `frame` shows again on the way back."""
    source = stream.shot.frames - 1 - frame
    around = range(source - NEIGHBOURS, source + NEIGHBOURS + 1)
    return [number for number in around if number in stream.stream.pages and number < frame]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _scores(video: Tensor, dense: Tensor, truth: Tensor, start: int) -> dict[str, Any]:
    """Against the unquantised cache and against truth, from frame `start` of the way back on."""
    found: dict[str, Any] = {}
    for name, other in (("dense", dense), ("truth", truth)):
        curve = psnr(video, other).clamp_max(MAX_PSNR)
        later = curve[:, start:]
        found[name] = {
            "first": later[:, 0].mean().item(),
            "mean": later.mean().item(),
            "last": later[:, -8:].mean().item(),
            "ssim": ssim(video, other)[:, start:].mean().item(),
            "curve": [round(x, 3) for x in curve.mean(0).tolist()],
            "paths": [round(x, 3) for x in later.mean(1).tolist()],
        }
    return found


def run(arguments: argparse.Namespace, rows: Sequence[Squeezed] = ROWS) -> Iterator[list[dict[str, Any]]]:
    """All scores so far, after every row; the first row is what the others are compared with."""
    model = load_model(arguments.weights, arguments.device)
    given = arguments.given
    shots = return_shots(
        arguments.worlds, given=given, generated=given, resolution=model.config.resolution, device=arguments.device
    )
    stage, done = _Stage(model, shots, arguments), list[dict[str, Any]]()
    truth = torch.stack([shot.truth[given:] for shot in shots]).to(arguments.device)
    dense: Tensor | None = None
    for row in rows:
        began = time.perf_counter()
        found = stage.run(row)
        video = found.pop("video")
        dense = video if dense is None else dense
        start = row.start(given)
        scores = _scores(video, dense, truth, start)
        done.append({"name": row.name, "from_frame": start, **found, **scores})
        done[-1]["seconds"] = round(time.perf_counter() - began, 2)
        yield done


def _line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A row as printed; against the format's first row where both have all frames."""
    against = next(other for other in rows if other["name"].split(",")[0] == row["name"].split(",")[0])
    gap = ""
    if against is not row and against["from_frame"] == row["from_frame"]:
        paths = (torch.tensor(one["dense"]["paths"]) for one in (row, against))
        gap = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*paired_interval(*paths))
    return (
        f"{row['name']:56s} {row['bits']:6.3f} b | dense {row['dense']['first']:6.2f} {row['dense']['mean']:6.2f} "
        f"{row['dense']['last']:6.2f} | truth {row['truth']['mean']:6.2f} | freed {row['freed_nbytes'] / 1e6:6.2f} MB "
        f"| {gap} {row['seconds']:.1f} s"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--worlds", type=int, default=24)
    parser.add_argument("--given", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--span-frames", type=int, default=16)
    parser.add_argument("--memory", default="6GiB")
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this; repeatable")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    config = {**vars(arguments), "weights": arguments.weights.name}
    wanted = [row for row in ROWS[1:] if not arguments.only or any(part in row.name for part in arguments.only)]
    for rows in run(arguments, [ROWS[0], *wanted]):
        print(_line(rows[-1], rows), flush=True)
        results_file.write(
            arguments.json, results_file.result(device=arguments.device, config=config, results={"rows": rows})
        )


if __name__ == "__main__":
    main()
