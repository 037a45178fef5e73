"""Compiles the codec's kernels for sm_90, which needs ptxas but no GPU; prints a row per compiled variant as JSON.

The real launchers run over CPU tensors under a driver that only names the target, so that types, alignment, constants
and grids are those of a launch; nothing is executed. Exit status 77: there is no compiler here. Run by the tests in a
process without Triton's interpreter.
"""

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from qvg_paged.kernels import _decode_triton, _kmeans_triton, _span_triton
from qvg_paged.kernels._span_plan import workspace_nbytes
from qvg_paged.kernels._span_workspace import Workspace
from qvg_paged.kernels.formats import DENSE_CODEC, FORMATS, BalanceRule, CentroidType, Codec, ScaleRule
from qvg_paged.kernels.layout import PartLayout
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

HEADS, GRID, FRAMES = 3, (15, 20), 2
TOKENS = GRID[0] * GRID[1]
QVG4 = FORMATS["qvg4-int2"].key
CODECS = {
    "qvg4": QVG4,
    "qvg4-fp8": replace(QVG4, centroid_type=CentroidType.FP8, scale_rule=ScaleRule.LEAST_SQUARES),
    "qvg-pro": replace(FORMATS["qvg-pro-int2"].key, stages=2),
    "int4": replace(FORMATS["qvg-int4"].key, num_centroids=200),
    "residual": replace(QVG4, centroid_type=CentroidType.FP8, balance_rule=BalanceRule.RESIDUAL),
    "dense": DENSE_CODEC,
}
VARIANTS = [
    *((name, torch.bfloat16, 128) for name in CODECS),
    ("qvg4", torch.bfloat16, 256),
    ("qvg4", torch.float16, 64),
]


def record_launches() -> list[dict[str, Any]]:
    """Replace Triton's driver and its launches; the list grows by a row per compiled variant."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    class Driver:
        class utils:  # noqa: N801 - Triton's name
            @staticmethod
            def load_binary(*_: Any) -> tuple[None, None, int, int, int]:
                return None, None, 0, 0, 1024

            @staticmethod
            def get_device_properties(_: int) -> dict[str, int]:
                return {"max_shared_mem": 227 << 10}

        def launcher_cls(self, *_: Any) -> Any:
            return lambda *_: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return device

    rows: list[dict[str, Any]] = []
    launch, known = triton.runtime.jit.JITFunction.run, set[int]()

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        del warmup
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in known:
            known.add(id(kernel))
            row = {"kernel": self.__name__, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
            rows.append({**row, "grid": list(grid)})
        return kernel

    triton.runtime.driver.set_active(Driver())
    triton.runtime.jit.JITFunction.run = compile_only
    return rows


def part(codec: Codec, dtype: torch.dtype, dim: int) -> PartLayout:
    return PartLayout(
        codec=codec, tokens=TOKENS, heads=HEADS, head_dim=dim, dtype=dtype,
        num_centroids=codec.centroids_for(FRAMES * TOKENS), split_pairs=not codec.is_dense,
    )  # fmt: skip


def _launch_span(layout: PartLayout, buffer: torch.Tensor, tensors: int, rows: range) -> None:
    x = torch.zeros(tensors * FRAMES * TOKENS * HEADS * layout.head_dim, dtype=layout.dtype)
    # Tables start wherever a layer's row does.
    table = torch.zeros(8, FRAMES, dtype=torch.int64)[1 : tensors + 1]
    tokens = _span_triton.SpanTokens(
        x, table, HEADS * layout.head_dim, layout.head_dim, TOKENS, HEADS, layout.head_dim
    )  # fmt: skip
    places = _span_triton.SpanPlaces(buffer, (layout,) * tensors, table, table[:, 0].contiguous())
    workspace = Workspace(2 * workspace_nbytes(layout, tokens.span_tokens), buffer.device)
    _span_triton.encode_group(tokens, places, rows, workspace)


def launch_codec(codec: Codec, dtype: torch.dtype, dim: int) -> None:
    """Every launch of a span's way into the pool and back, group sizes and table rows as they fall."""
    layout = part(codec, dtype, dim)
    buffer = torch.zeros(1 << 22, dtype=torch.uint8)
    if not codec.is_dense:
        for tensors, first, rows in ((1, 0, 1), (1, 1, 2), (2, 0, 6), (2, 3, 2)):
            _launch_span(layout, buffer, tensors, range(first, first + rows))
    spec = RoPESpec(head_dim=dim, grid=GRID)
    for rope in (None, spec.tables([float(i) for i in range(8)])):
        for start in range(4):
            pages = torch.zeros(8, dtype=torch.int32)[start : start + 2]
            some = slice(start, start + 2)
            tables = rope and rope.of_frames(some)
            out = torch.zeros(2 * TOKENS, HEADS, dim, dtype=dtype)
            _decode_triton.decode_pages(
                buffer, pages, pages, layout, start * (1 << 16), 0, out, tables, RoPELayout.INTERLEAVED
            )
            if (codec, dtype, dim) == (QVG4, torch.bfloat16, 128):
                offsets = (start * (1 << 16), 0, 64, 16)
                _decode_triton.decode_both(
                    buffer, pages, pages, layout, offsets, (out, out), tables, RoPELayout.INTERLEAVED
                )


def main() -> None:
    try:
        from triton import knobs  # noqa: PLC0415

        assert knobs.nvidia.ptxas.path
    except Exception as error:
        print(f"no compiler for sm_90: {error}")  # noqa: T201
        sys.exit(77)
    torch.set_num_threads(1)
    _kmeans_triton.on_hopper = lambda _: True
    rows, compiled = record_launches(), []
    for name, dtype, dim in VARIANTS:
        before = len(rows)
        launch_codec(CODECS[name], dtype, dim)
        compiled += [{"codec": name, "dtype": str(dtype), "head_dim": dim, **row} for row in rows[before:]]
    print(json.dumps(compiled))  # noqa: T201


if __name__ == "__main__":
    main()
