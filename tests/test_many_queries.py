"""The kernel for many query rows: its algorithm in the interpreter, its shares; on a GPU as it is."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attention_case import LAYER, Case, build_case

from qvg_paged.kernels import direct_path, many_queries
from qvg_paged.kernels.attention import AttentionPath, paged_attention
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.direct_path import partial_nbytes
from qvg_paged.kernels.formats import DENSE, FORMATS, PageFormat

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.cuda.is_available()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct path takes this kernel, interpreted, wherever it can read the pages."""
    if CUDA:
        pytest.skip("Triton's interpreter is off where there is a GPU")
    from interpreted_warps import interpreted  # noqa: PLC0415

    folder = Path(many_queries.__file__).parent
    kernel = interpreted(folder / "_page_ring_gluon.py", folder / "_many_queries_gluon.py")
    monkeypatch.setitem(sys.modules, "qvg_paged.kernels._many_queries_gluon", kernel)
    monkeypatch.setattr(direct_path, "has_wgmma", lambda _: True)
    monkeypatch.setattr(direct_path, "FEWEST_ROWS", 1)


def direct(
    q: torch.Tensor, case: Case, cu: list[int], workspace: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(
        q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=cu, path=AttentionPath.DIRECT,
        workspace=workspace,
    )  # fmt: skip


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("name", "tokens", "group", "queries"),
    [
        ("qvg4-int2", 256 + 37, 1, 20),
        ("qvg-int2", 47, 1, 70),
        ("qvg4-int2", 300, 2, 80),
        ("qvg4-int2", 1, 1, 33),
    ],
)
def test_decoding_beside_attending_attends_as_well_as_pytorch(name: str, tokens: int, group: int, queries: int) -> None:
    case = build_case([FORMATS[name]], [[0, 0]], tokens=tokens, heads=1, head_dim=128, dtype=torch.bfloat16)
    q = torch.randn(queries, group, 128, dtype=torch.bfloat16)
    out, lse = direct(q, case, [0, queries])
    case.check(q, [0, queries], out, lse, 128**-0.5)


@pytest.mark.usefixtures("interpreter")
def test_keys_and_values_may_have_levels_and_codebooks_of_their_own() -> None:
    value = replace(FORMATS["qvg-int2"].value, num_centroids=3)
    fmt = PageFormat(name="mixed", key=FORMATS["qvg4-int2"].key, value=value)
    case = build_case([fmt], [[0, 0]], tokens=90, heads=2, head_dim=128, dtype=torch.bfloat16)
    q = torch.randn(40, 2, 128, dtype=torch.bfloat16)
    out, lse = direct(q, case, [0, 40])
    case.check(q, [0, 40], out, lse, 128**-0.5)


@pytest.mark.usefixtures("interpreter")
def test_a_ragged_batch_with_two_formats_and_codebooks_that_change_is_attended() -> None:
    case = build_case(
        [FORMATS["qvg4-int2"], FORMATS["qvg-int2"]], [[0, 1, 0], [], [0]], tokens=20, heads=1, head_dim=128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    wide = torch.randn(60, 3, 2, 128, dtype=torch.bfloat16)
    q, cu = wide[:, 1, 1:], [0, 25, 30, 60]
    out, lse = direct(q, case, cu)
    case.check(q, cu, out, lse, 128**-0.5)


@pytest.mark.parametrize("most", [1, 3, None])
def test_shares_are_as_many_as_there_is_memory_for_their_results(most: int | None) -> None:
    case = build_case([FORMATS["qvg-int2"]], [[0] * 12, [0] * 4], tokens=300, heads=1, head_dim=128)
    work, rows = many_queries.many_shares(case.table, 0, case.layouts[0], (0, 20, 50), range(2), 1, 30, 100, most)
    assert rows == (128 if most == 1 else 64)
    assert work.slots <= (most or 100)
    assert most is not None or work.slots > 3
    keys: dict[int, int] = {}
    for _, _, _, _, tiles, _, query, _, _ in work.items.tolist():
        keys[query] = keys.get(query, 0) + tiles
    assert keys == {0: 12 * 5, 20: 4 * 5}


@pytest.mark.parametrize(
    ("rows", "block"),
    [(17, 64), (64, 64), (65, 128), (128, 128), (129, 192), (192, 192), (256, 128), (257, 192), (4680, 192)],
)
def test_a_program_has_a_block_of_rows_for_each_of_its_warpgroups(rows: int, block: int) -> None:
    assert many_queries.block_rows(rows) == block
    assert block // 64 in many_queries.LAUNCHES


def test_a_kernel_that_does_not_compile_is_given_up_once_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(many_queries.KERNEL, "given_up", set())
    monkeypatch.setattr(direct_path, "has_wgmma", lambda device: device not in many_queries.KERNEL.given_up)
    monkeypatch.setattr(direct_path, "reads_many_queries", lambda *_: True)
    monkeypatch.setattr(direct_path, "many_queries_attention", fail)
    case = build_case([FORMATS["qvg4-int2"]], [[0, 0]], tokens=12)
    q = torch.randn(40, 2, 64)
    with pytest.warns(RuntimeWarning, match="slower kernel on cpu.*PassManager"):
        out, lse = direct(q, case, [0, 40])
    case.check(q, [0, 40], out, lse, 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "cu", "group"),
    [
        (1560, [0, 333, 400, 2000], 1),
        (1560, [0, 33], 1),
        (300, [0, 64, 80], 3),
        (300, [0, 128, 128, 140], 1),
        (47, [0, 64], 1),
        (1, [0, 90], 2),
    ],
)
def test_bf16_attention_of_many_rows_is_as_good_as_pytorch(tokens: int, cu: list[int], group: int) -> None:
    if not many_queries.has_wgmma(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    formats = [FORMATS["qvg4-int2"], FORMATS["qvg-int2"], DENSE]
    sequences = [[0, 0, 1, 0, 2]] * (len(cu) - 1)
    case = build_case(formats, sequences, tokens=tokens, head_dim=128, dtype=torch.bfloat16, device="cuda")
    wide = torch.randn(cu[-1], 2, 2 * group + 1, 128, dtype=torch.bfloat16, device="cuda")
    q = wide[:, 1, 1:]
    least = max(b - a for a, b in pairwise(cu)) * 2 * group
    for workspace in (None, torch.empty(8 * partial_nbytes(least, 128), dtype=torch.uint8, device="cuda")):
        out, lse = direct(q, case, cu, workspace)
        case.check(q, cu, out, lse, 128**-0.5)


@pytest.mark.gpu
def test_histories_of_fifty_lengths_compile_one_kernel_for_many_rows() -> None:
    if not many_queries.has_wgmma(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    from qvg_paged.kernels._many_queries_gluon import many_queries_kernel  # noqa: PLC0415

    def compiled() -> int:
        return sum(len(cache[0]) for cache in many_queries_kernel.device_caches.values())

    fmt = FORMATS["qvg4-int2"].with_codecs(num_centroids=16)
    case = build_case([fmt], [[0] * 50], tokens=64, head_dim=128, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(40, 2, 128, dtype=torch.bfloat16, device="cuda")
    counts = set()
    for pages in range(1, 51):
        table = BlockTable(
            pages=case.table.pages[:pages], codebooks=case.table.codebooks[:pages], formats=(0,) * pages,
            positions=(0.0,) * pages, indptr=(0, pages), device=case.table.device,
        )  # fmt: skip
        direct(q, replace(case, table=table), [0, 40])
        counts.add(compiled())
    assert len(counts) == 1
    assert 0 not in counts
