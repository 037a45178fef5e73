"""The caches that the closed-loop evaluation compares."""

from dataclasses import dataclass, replace

from qvg_paged import FORMATS, QVG, AttentionPath, Codec, Grid, PageFormat, ScaleRule
from qvg_paged.kernels.formats import DENSE, DENSE_CODEC

__all__ = ["CONTROLS", "FORMAT_ROWS", "Row"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache under test.

    Attributes:
        name: as printed.
        format: of closed spans.
        window: newest frames kept; None for all.
        path: how attention reads pages; None for the device's default.
        noise: offset to the seed of the sampling noise.
    """

    name: str
    format: PageFormat
    window: int | None = None
    path: AttentionPath | None = None
    noise: int = 0


def _of(name: str, key: Codec, value: Codec | None = None) -> Row:
    return Row(name=name, format=PageFormat(name=name, key=key, value=value or key))


OURS = FORMATS["qvg4-int2"].key
INT4 = FORMATS["qvg-int4"].key

CONTROLS = (
    Row(name="rerun, reference path", format=DENSE, path=AttentionPath.REFERENCE),
    Row(name="other noise seed", format=DENSE, noise=92),
    Row(name="last 4 frames only", format=DENSE, window=4),
)
"""What a difference means: numerical noise, sampling noise, no memory."""

FORMAT_ROWS = (
    *(Row(name=name, format=fmt) for name, fmt in FORMATS.items() if not fmt.is_dense),
    _of("qvg-int2, no smoothing", replace(QVG, stages=0)),
    _of("int4, no smoothing", replace(INT4, stages=0)),
    _of("qvg-int2, balanced", replace(QVG, balanced=True)),
    _of("4 levels, searched, unbalanced", replace(OURS, balanced=False)),
    _of("qvg4-int2, absmax", replace(OURS, scale_rule=ScaleRule.ABSMAX)),
    _of("qvg4-int2, least squares", replace(OURS, scale_rule=ScaleRule.LEAST_SQUARES)),
    _of("qvg4-int2, blocks of 128", replace(OURS, block_size=128)),
    _of("qvg-int4, balanced", replace(INT4, balanced=True)),
    _of("qvg-int2, keys only", QVG, DENSE_CODEC),
    _of("qvg-int2, values only", DENSE_CODEC, QVG),
    _of("qvg4-int2, keys only", OURS, DENSE_CODEC),
    _of("qvg4-int2, values only", DENSE_CODEC, OURS),
    _of("qvg4, keys int4 and values int2", replace(OURS, grid=Grid.INT4), OURS),
    *(
        Row(name=f"{name}, {path.value}", format=FORMATS[name], path=path)
        for name in ("qvg4-int2", "best-2bit")
        for path in (AttentionPath.STAGED, AttentionPath.STAGED_FP8)
    ),
)
"""Every known format, then one change at a time, then the precisions of attention."""
