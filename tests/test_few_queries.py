"""The kernel for few query rows: its algorithm in the interpreter, its shares, its compilation; on a GPU as it is."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from attention_case import LAYER, Case, build_case
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.errors import TritonError

from qvg_paged.kernels import direct_path, few_queries
from qvg_paged.kernels.attention import AttentionPath, paged_attention
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.formats import DENSE, FORMATS, CentroidType
from qvg_paged.kernels.layout import GRANULE, PageLayout
from qvg_paged.kernels.merge import merge_partials_reference

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.cuda.is_available()


def attend(case: Case, q: torch.Tensor, cu: list[int], programs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Only this kernel and a merge; memory it should not read is not a number."""
    layout, group = case.layouts[0], q.shape[1] // case.layouts[0].key.heads
    rows = few_queries.block_rows(max(b - a for a, b in pairwise(cu)) * group)
    work = few_queries.shares(
        case.table, 0, layout, tuple(cu), range(case.table.batch), group, rows, programs,
        few_queries.page_groups(layout.key.tokens),
    )  # fmt: skip
    tables = torch.full((few_queries.tables_nbytes(layout, work, rows),), 0xFF, dtype=torch.uint8)
    partials = torch.full((work.slots, *q.shape), float("nan"))
    partial_lse = torch.full((work.slots, *q.shape[:2]), float("nan"))
    few_queries.few_queries_attention(
        partials, partial_lse, q, case.buffer, layout, 1, case.table.groups[0].pages, work, tables,
        softmax_scale=0.125, rows=rows,
    )  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2])
    merge_partials_reference(partials, partial_lse, out, lse)
    return out, lse


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if CUDA:
        pytest.skip("Triton's interpreter is off where there is a GPU")
    from interpreted_gluon import interpreted, run_as_warps  # noqa: PLC0415

    folder = Path(few_queries.__file__).parent
    parts = [folder / f"_few_{part}_gluon.py" for part in ("operands", "loads", "shared", "outputs")]
    module = interpreted(folder / "_few_queries_gluon.py", parts)
    run_as_warps(module.few_queries_kernel, few_queries.WARPS)
    monkeypatch.setitem(sys.modules, "qvg_paged.kernels._few_queries_gluon", module)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("name", "head_dim", "tokens", "group", "cu"),
    [
        ("qvg4-int2", 64, 256 + 23, 2, [0, 3]),
        ("qvg4-int2", 128, 280, 1, [0, 11]),
        ("qvg-int2", 128, 37, 3, [0, 1]),
        ("qvg-int2", 64, 1, 1, [0, 20]),
    ],
)
def test_the_algorithm_attends_as_well_as_pytorch(
    name: str, head_dim: int, tokens: int, group: int, cu: list[int]
) -> None:
    case = build_case([FORMATS[name]], [[0, 0]], tokens=tokens, heads=1, head_dim=head_dim, dtype=torch.bfloat16)
    q = torch.randn(cu[-1], group, head_dim, dtype=torch.bfloat16)
    out, lse = attend(case, q, cu, 3)
    case.check(q, cu, out, lse, 0.125)


@pytest.mark.usefixtures("interpreter")
def test_a_ragged_batch_and_codebooks_that_change_are_cut_into_shares() -> None:
    fmt = FORMATS["qvg4-int2"]
    case = build_case([fmt, DENSE], [[0, 1, 0, 0], [], [0]], tokens=20, dtype=torch.bfloat16)
    q = torch.randn(9, 4, 64, dtype=torch.bfloat16)
    only = [i for i, f in enumerate(case.table.formats) if f == 0]
    table = BlockTable(
        pages=tuple(case.table.pages[i] for i in only), codebooks=tuple(case.table.codebooks[i] for i in only),
        formats=(0,) * 4, positions=(0.0,) * 4, indptr=(0, 3, 3, 4), device=case.table.device,
    )  # fmt: skip
    quantised = Case(case.buffer, table, case.layouts, None)
    out, lse = attend(quantised, q, [0, 2, 4, 9], 12)
    quantised.check(q, [0, 2, 4, 9], out, lse, 0.125)


@pytest.mark.usefixtures("interpreter")
def test_large_and_tiny_queries_lose_nothing() -> None:
    case = build_case([FORMATS["qvg4-int2"]], [[0]], tokens=40, heads=1, dtype=torch.bfloat16)
    q = torch.randn(3, 1, 64, dtype=torch.bfloat16) * torch.tensor([[[30.0]], [[1e-3]], [[0.0]]], dtype=torch.bfloat16)
    out, lse = attend(case, q, [0, 3], 2)
    case.check(q, [0, 3], out, lse, 0.125)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("queries", [1, 9])
def test_tokens_that_all_have_one_centroid_are_summed_as_exactly_as_any(queries: int) -> None:
    case = build_case([FORMATS["qvg4-int2"]], [[0, 0, 0]], tokens=256, heads=1, dtype=torch.bfloat16)
    layout = case.layouts[0]
    for page in case.table.pages:
        for part, at in ((layout.key, layout.key_offset(LAYER)), (layout.value, layout.value_offset(LAYER))):
            part.plane("ids").view(case.buffer, page * GRANULE + at).fill_(1)
    q = torch.randn(queries, 1, 64, dtype=torch.bfloat16)
    out, lse = attend(case, q, [0, queries], 1)
    case.check(q, [0, queries], out, lse, 0.125)


@pytest.mark.usefixtures("interpreter")
def test_keys_that_score_higher_and_higher_are_weighted_by_the_highest() -> None:
    case = build_case([FORMATS["qvg4-int2"]], [[0] * 4], tokens=64, heads=1, dtype=torch.bfloat16)
    layout, q = case.layouts[0], torch.randn(2, 1, 64, dtype=torch.bfloat16)
    for number, page in enumerate(case.table.pages):
        scales = layout.key.plane("scales").view(case.buffer, page * GRANULE + layout.key_offset(LAYER))
        scales.copy_(torch.full(scales.shape, 0.25 * 4.0**number))
    out, lse = attend(case, q, [0, 2], 1)
    case.check(q, [0, 2], out, lse, 0.125)


def test_sums_of_weights_hold_as_many_keys_as_a_share_may_have() -> None:
    shared = pytest.importorskip("qvg_paged.kernels._few_shared_gluon")
    operands = pytest.importorskip("qvg_paged.kernels._few_operands_gluon")
    assert operands.WARPS.value == few_queries.WARPS
    keys = few_queries.MOST_GROUPS * few_queries.CODE_ROWS * 4
    assert keys * 2 ** (shared.SLACK.value + shared.FRACTION_BITS.value) <= 2**32


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4),
    queries=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    tokens=st.integers(1, 700), group=st.integers(1, 3), programs=st.integers(1, 400),
)  # fmt: skip
def test_shares_cover_every_key_of_every_query_once(
    runs: list[list[int]], queries: list[int], tokens: int, group: int, programs: int
) -> None:
    books = [[100 * b + i for i, count in enumerate(run) for _ in range(count)] for b, run in enumerate(runs)]
    flat = [book for row in books for book in row]
    indptr, cu = [0], [0]
    for row, count in zip(books, queries, strict=False):
        indptr.append(indptr[-1] + len(row))
        cu.append(cu[-1] + count)
    table = BlockTable(
        pages=tuple(range(len(flat))), codebooks=tuple(flat), formats=(0,) * len(flat), positions=(0.0,) * len(flat),
        indptr=tuple(indptr), device=torch.device("cpu"),
    )  # fmt: skip
    if not flat:
        return
    layout = PageLayout.build(
        FORMATS["qvg-int2"], num_layers=1, tokens=tokens, heads=2, head_dim=64, dtype=torch.bfloat16, span_tokens=tokens
    )
    per_page = few_queries.page_groups(tokens)
    work = few_queries.shares(table, 0, layout, tuple(cu), range(len(runs)), group, 8, programs, per_page)
    read: dict[tuple[int, int], list[int]] = {}
    used: dict[tuple[int, int], list[int]] = {}
    for number, book, entry, first, count, slot, query, row, live in work.items.tolist():
        assert 0 < count <= few_queries.MOST_GROUPS * few_queries.WARPS
        assert set(flat[entry : entry + (first + count - 1) // per_page + 1]) == {book}
        assert work.tables[number].tolist() == [book, query, row, live]
        read.setdefault((query, row), []).extend(range(entry * per_page + first, entry * per_page + first + count))
        used.setdefault((query, row), []).append(slot)
    for b in range(len(runs)):
        keys = list(range(indptr[b] * per_page, indptr[b + 1] * per_page))
        for row in range(0, queries[b] * group if keys else 0, 8):
            assert sorted(read.pop((cu[b], row))) == keys
            slots = used[cu[b], row]
            assert sorted(slots) == list(range(len(slots)))
            assert len(slots) <= work.slots
            assert work.ragged or len(slots) == work.slots
    assert not read


@pytest.mark.parametrize("error", [TritonError("no such layout\nat 3:1"), RuntimeError("PassManager::run failed")])
def test_a_kernel_that_does_not_compile_is_given_up_once_and_said_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tries = []

    def fail(*_: object, **__: object) -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr(few_queries.KERNEL, "given_up", set())
    monkeypatch.setattr(direct_path, "has_gluon", lambda device: device not in few_queries.KERNEL.given_up)
    monkeypatch.setattr(direct_path, "reads_few_queries", lambda *_: True)
    monkeypatch.setattr(direct_path, "few_queries_attention", fail)
    case = build_case([FORMATS["qvg4-int2"]], [[0, 0]], tokens=12)
    q = torch.randn(2, 2, 64)
    with pytest.warns(RuntimeWarning, match=f"slower kernel on cpu.*{str(error).splitlines()[0]}"):
        out, lse = direct(q, case, [0, 2])
    case.check(q, [0, 2], out, lse, 0.125)
    out, lse = direct(q, case, [0, 2])
    case.check(q, [0, 2], out, lse, 0.125)
    assert len(tries) == 1


def test_a_device_that_ran_out_of_memory_is_no_reason_to_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(direct_path, "has_gluon", lambda _: True)
    monkeypatch.setattr(direct_path, "reads_few_queries", lambda *_: True)
    monkeypatch.setattr(direct_path, "few_queries_attention", fail)
    with pytest.raises(torch.OutOfMemoryError):
        direct(torch.randn(2, 2, 64), build_case([FORMATS["qvg4-int2"]], [[0, 0]], tokens=12), [0, 2])
    assert torch.device("cpu") not in few_queries.KERNEL.given_up


def direct(q: torch.Tensor, case: Case, cu: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(q, case.buffer, case.table, case.layouts, LAYER, cu_seqlens_q=cu, path=AttentionPath.DIRECT)


def test_formats_it_cannot_read_are_left_to_the_other_kernel() -> None:
    def reads(name: str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, **changes: object) -> bool:
        layout = PageLayout.build(
            FORMATS[name].with_codecs(**changes), num_layers=1, tokens=64, heads=1, head_dim=head_dim,
            dtype=torch.bfloat16, span_tokens=512,
        )  # fmt: skip
        return few_queries.reads_few_queries(layout, dtype)

    assert reads("qvg4-int2")
    assert reads("qvg-int2", head_dim=64)
    assert not reads("qvg4-int2", dtype=torch.float32)
    assert not reads("qvg4-int2", dtype=torch.float16)
    assert not reads("qvg4-int2", head_dim=256)
    assert not reads("qvg4-int2", centroid_type=CentroidType.FP8)
    assert not any(map(reads, ("qvg-pro-int2", "qvg-int4", "dense")))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1560, 1001, 37])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bf16_attention_of_few_queries_is_as_good_as_pytorch(head_dim: int, tokens: int) -> None:
    formats = [DENSE, FORMATS["qvg4-int2"], FORMATS["qvg-int2"]]
    sequences = [[1, 1, 1, 0], [2], [], [1, 0, 1, 1, 2]]
    case = build_case(
        formats, sequences, tokens=tokens, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    for cu in ([0, 1, 2, 3, 4], [0, 2, 10, 11, 16], [0, 16, 20, 20, 25]):
        q = torch.randn(cu[-1], 8, head_dim, dtype=torch.bfloat16, device="cuda")
        workspace = torch.full((64 << 20,), 0xFF, dtype=torch.uint8, device="cuda")
        out, lse = paged_attention(
            q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, path=AttentionPath.DIRECT, workspace=workspace
        )
        case.check(q, cu, out, lse, head_dim**-0.5)


@pytest.mark.gpu
def test_fifty_lengths_compile_nothing_new() -> None:
    from qvg_paged.kernels._few_queries_gluon import few_queries_kernel  # noqa: PLC0415
    from qvg_paged.kernels._query_tables_triton import query_tables_kernel  # noqa: PLC0415

    def compiled() -> int:
        return sum(
            len(cache[0]) for k in (few_queries_kernel, query_tables_kernel) for cache in k.device_caches.values()
        )

    fmt = FORMATS["qvg4-int2"].with_codecs(num_centroids=16)
    case = build_case([fmt], [[0] * 50], tokens=64, dtype=torch.bfloat16, device="cuda")
    q = torch.randn(3, 2, 64, dtype=torch.bfloat16, device="cuda")
    counts = []
    for pages in range(1, 51):
        table = BlockTable(
            pages=case.table.pages[:pages], codebooks=case.table.codebooks[:pages], formats=(0,) * pages,
            positions=(0.0,) * pages, indptr=(0, pages), device=case.table.device,
        )  # fmt: skip
        paged_attention(q, case.buffer, table, case.layouts, 1, cu_seqlens_q=[0, 3], path=AttentionPath.DIRECT)
        counts.append(compiled())
    assert counts[0] > 0
    assert counts[-1] == counts[0]
