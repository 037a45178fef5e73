"""Candidate kernels for direct reads: their algorithms in the interpreter, their compilation for Hopper."""

import sys
from pathlib import Path

import pytest
import torch
from attention_case import build_case

from qvg_paged.kernels.formats import FORMATS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
@pytest.mark.parametrize(
    ("name", "head_dim", "tokens", "group", "cu", "rows"),
    [
        ("qvg4-int2", 128, 256 + 37, 1, (0, 20), 64),
        ("qvg-int2", 64, 47, 1, (0, 70, 90), 128),
        ("qvg4-int2", 64, 1, 2, (0, 33), 64),
    ],
)
def test_decoding_into_shared_memory_attends_as_well_as_pytorch(
    name: str, head_dim: int, tokens: int, group: int, cu: tuple[int, ...], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from direct_candidates import wgmma  # noqa: PLC0415
    from interpreted_gluon import interpreted  # noqa: PLC0415

    kernel = interpreted(BENCHMARKS / "direct_candidates" / "wgmma_kernel.py")
    monkeypatch.setitem(sys.modules, "direct_candidates.wgmma_kernel", kernel)
    sequences = [[0, 0]] * (len(cu) - 1)
    case = build_case([FORMATS[name]], sequences, tokens=tokens, heads=1, head_dim=head_dim, dtype=torch.bfloat16)
    q = torch.randn(cu[-1], group, head_dim, dtype=torch.bfloat16)
    out, lse = wgmma.attend(
        q, case.buffer, case.table, case.layouts[0], 1, cu, rows=rows, tokens=rows // 2, softmax_scale=0.125,
        processors=3,
    )  # fmt: skip
    case.check(q, cu, out, lse, 0.125)
