"""Costs of the simulated engine from what a GPU has measured: result files of ``qvg-paged bench`` and of `park_bench`.

A chunk costs what the measured loop of a transformer's layers takes, by the products and the attention of the geometry
in question against those of the loop, and its frames' quantisation. Streams of one batch do not share any of it: on the
GPU their attention takes as long together as one after the other.
"""

import json
from pathlib import Path
from typing import Any

from qvg_paged.errors import ArgumentError
from stress.models import MODELS, Costs, Geometry

__all__ = ["measured_costs"]

LOOP, ENCODE, FORMAT = "chunk loop", "K and V of a span", "qvg4-int2"


def measured_costs(path: Path, model: str) -> Costs:
    """Costs of a geometry from a result file of ``qvg-paged bench``, and from ``park_bench.json`` beside it if there.

    Args:
        path: result file.
        model: name in `MODELS`.

    Raises:
        ArgumentError: the file cannot be read, or it has not measured a loop of chunks and encoding.
    """
    content = _read(path)
    loop, encode = (_row(content, path, name) for name in (LOOP, ENCODE))
    shape, geometry = encode["shape"], MODELS[model]
    span_nbytes = 2 * 2 * shape["heads"] * shape["tokens"] * shape["head_dim"]
    encode_rate = span_nbytes / _seconds(encode, path, FORMAT)
    share = _operations(geometry) / _loop_operations(loop["shape"])
    chunk = _seconds(loop, path, "auto") * share
    chunk += geometry.model.frames_per_chunk * geometry.model.frame_nbytes / encode_rate
    rate, source = Costs.transfer_rate, f"{path.name} of {content['device']['name']}, commit {content['commit']}"
    beside = path.with_name("park_bench.json")
    if beside.exists():
        row = next(row for row in _read(beside)["results"]["rows"] if row["format"] == FORMAT)
        rate, source = 1e9 * min(row["park_gb_s"], row["resume_gb_s"]), f"{source}, and {beside.name}"
    else:
        source += "; transfers in round figures"
    return Costs(chunk=chunk, chunk_more=chunk, encode_rate=encode_rate, transfer_rate=rate, source=source)


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
        return content if "results" in content else {"results": {"rows": []}}
    except (OSError, ValueError, TypeError) as error:
        raise ArgumentError(f"costs: expected a result file, got {path.name}: {error}") from None


def _row(content: Any, path: Path, name: str) -> Any:
    rows = content["results"].get("rows", ()) if isinstance(content["results"], dict) else ()
    for row in rows:
        if row.get("name", "").startswith(name):
            return row
    raise ArgumentError(f"costs: expected a result file of qvg-paged bench with {name!r}, found none in {path.name}")


def _seconds(row: Any, path: Path, system: str) -> float:
    timing = row["systems"].get(system, {}).get("timing")
    if not timing:
        raise ArgumentError(f"costs: expected a time of {system!r} in {row['name']!r}, found none in {path.name}")
    return float(timing["median_ms"]) / 1e3


def _layer(tokens: int, visible: int, channels: int, wide: int) -> float:
    """Multiplications of a transformer's layer: self and cross attention's products, the MLP's, and attention."""
    return tokens * (8 * channels**2 + 2 * channels * wide) + 2 * tokens * visible * channels


def _loop_operations(shape: Any) -> float:
    tokens, channels = shape["tokens"] * shape["chunk"], shape["heads"] * shape["head_dim"]
    visible = tokens + shape["tokens"] * shape["history"]
    return float(shape["layers"] * _layer(tokens, visible, channels, shape["ffn"]))


def _operations(geometry: Geometry) -> float:
    """The same of a model whose history fills its window, as wide inside as models of this kind are."""
    model, window = geometry.model, geometry.window
    tokens, channels = model.tokens_per_frame * model.frames_per_chunk, model.num_kv_heads * model.head_dim
    visible = tokens + model.tokens_per_frame * (window.sink_frames + window.recent_frames)
    return model.num_layers * _layer(tokens, visible, channels, channels * 35 // 6)
