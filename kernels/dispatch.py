"""Which path reads the pages: measured times of similar calls where there are any, a careful rule elsewhere.

A table is made by ``qvg-paged bench --tune`` and looked for in the user's cache folder, then among those shipped with
the package (`dispatch_<device>.json`). Without one, `DispatchTable.choose` follows a rule: few queries read pages
directly, many decode them first, and nothing is attended in FP8.
"""

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qvg_paged.kernels.errors import ArgumentError

__all__ = ["AttentionPath", "DispatchRow", "DispatchTable", "Workload", "cache_file", "dispatch_table", "table_for"]

SCHEMA = "qvg-paged.dispatch/1"
DIRECT_QUERIES = 256
"""Without a table: calls with fewer query rows read pages directly."""
SHIPPED = Path(__file__).parent


class AttentionPath(Enum):
    """How pages are read; results agree within rounding."""

    REFERENCE = "reference"
    """Decode all of a sequence's pages in table order, then one `scaled_dot_product_attention` call."""
    STAGED = "staged"
    """Decode slices into bounded scratch, then the best dense kernel; slices merged by log-sum-exp."""
    STAGED_FP8 = "staged-fp8"
    """As `STAGED`, quantised pages decoded to and attended in E4M3; unquantised pages keep their dtype.

    Fast on devices of compute capability 9.0 and above; `STAGED` on older ones. A CPU repeats its roundings, slowly."""
    DIRECT = "direct"
    """A Triton kernel reads the pages, split over keys; CUDA, or Triton's interpreter."""
    AUTO = "auto"
    """The one that a measured table says is fastest here (`qvg_paged.kernels.dispatch`); never `REFERENCE`."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a choice depends on.

    Attributes:
        queries: query rows of the longest sequence: tokens times query heads per KV head.
        keys: tokens of the longest sequence's history and chunk.
        heads: KV heads times sequences.
        head_dim: channels per head.
        format: name of the quantised page format.
        rope: whether keys are rotated when read.
    """

    queries: int
    keys: int
    heads: int
    head_dim: int
    format: str
    rope: bool

    def distance(self, other: "Workload") -> float:
        """How unlike `other` is: octaves between sizes, and more for what changes the code that runs."""
        octaves = [
            weight * abs(math.log2(max(1, a) / max(1, b)))
            for weight, a, b in (
                (2.0, self.queries, other.queries),
                (0.5, self.keys, other.keys),
                (1.0, self.heads, other.heads),
            )
        ]
        kinds = [(8.0, "head_dim"), (4.0, "rope"), (4.0, "format")]
        return sum(octaves) + sum(cost for cost, name in kinds if getattr(self, name) != getattr(other, name))


@dataclass(frozen=True, kw_only=True)
class DispatchRow:
    """One measured workload: median milliseconds of each path that was tried."""

    workload: Workload
    milliseconds: tuple[tuple[AttentionPath, float], ...]

    def fastest(self, allowed: Collection[AttentionPath]) -> AttentionPath | None:
        """The quickest of the `allowed` paths, or None if none of them was measured."""
        tried = [(time, path) for path, time in self.milliseconds if path in allowed]
        return min(tried, key=lambda pair: pair[0])[1] if tried else None


@dataclass(frozen=True, kw_only=True)
class DispatchTable:
    """Measurements on one kind of device; without rows `choose` follows the rule.

    Attributes:
        device: name as the driver gives it.
        rows: what was measured.
    """

    device: str
    rows: tuple[DispatchRow, ...] = ()

    def choose(self, workload: Workload, allowed: Collection[AttentionPath]) -> AttentionPath:
        """The fastest of the `allowed` paths for the measured workload most like `workload`.

        Args:
            workload: sizes of the call.
            allowed: paths that can run, of `STAGED`, `STAGED_FP8` and `DIRECT`; at least one.
        """
        near = sorted(self.rows, key=lambda row: row.workload.distance(workload))
        fastest = next((path for row in near if (path := row.fastest(allowed))), None)
        return fastest or _rule(workload, allowed)

    def save(self, path: Path | str) -> Path:
        """Write the table as JSON, folders included; the file appears whole or not at all."""
        rows = [
            {**asdict(row.workload), "milliseconds": {path.value: time for path, time in row.milliseconds}}
            for row in self.rows
        ]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"schema": SCHEMA, "device": self.device, "rows": rows}, indent=1) + "\n")
        part.replace(path)
        return path

    @classmethod
    def load(cls, path: Path | str) -> "DispatchTable":
        """Read a table that `save` wrote.

        Raises:
            ArgumentError: the file cannot be read or is not such a table.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            rows = tuple(map(_row, content["rows"]))
            return cls(device=str(content["device"]), rows=rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"path: expected a dispatch table ({SCHEMA}), got {path}: {error}; "
                "remove it or run qvg-paged bench --tune"
            ) from error


def _row(entry: Mapping[str, Any]) -> DispatchRow:
    sizes = {name: int(entry[name]) for name in ("queries", "keys", "heads", "head_dim")}
    times = tuple((AttentionPath(path), float(time)) for path, time in entry["milliseconds"].items())
    if min(sizes.values()) < 1 or not all(time > 0 for _, time in times):
        raise ValueError(f"sizes and times are positive, not {dict(entry)}")
    workload = Workload(format=str(entry["format"]), rope=bool(entry["rope"]), **sizes)
    return DispatchRow(workload=workload, milliseconds=times)


def _rule(workload: Workload, allowed: Collection[AttentionPath]) -> AttentionPath:
    """Without measurements: exact paths before FP8, which a device has to earn."""
    exact = (AttentionPath.STAGED, AttentionPath.DIRECT)
    if workload.queries < DIRECT_QUERIES:
        exact = (AttentionPath.DIRECT, AttentionPath.STAGED)
    order = (*exact, AttentionPath.STAGED_FP8)
    return next(path for path in order if path in allowed)


def _slug(device: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return words.removeprefix("nvidia_") or "device"


def cache_file(device: str) -> Path:
    """The user's table for a device of that name: in ``$QVG_PAGED_CACHE``, or below ``$XDG_CACHE_HOME`` or ~/.cache."""
    folder = os.environ.get("QVG_PAGED_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(folder) if folder else base / "qvg-paged") / f"dispatch_{_slug(device)}.json"


@lru_cache
def table_for(device: str) -> DispatchTable:
    """The user's table for devices of that name, else the shipped one, else one without rows; read once a process.

    Raises:
        ArgumentError: the user's table is damaged.
    """
    for path in (cache_file(device), SHIPPED / f"dispatch_{_slug(device)}.json"):
        if path.is_file():
            return DispatchTable.load(path)
    return DispatchTable(device=device)


def dispatch_table(device: torch.device) -> DispatchTable:
    """The table in force on `device`; see `table_for`."""
    return table_for(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
