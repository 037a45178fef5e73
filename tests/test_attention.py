from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from attention_case import Case, build_case
from tolerance import exact_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qvg_paged.kernels import staged_attention, staged_plan
from qvg_paged.kernels.attention import AttentionPath, attention_workspace_nbytes, paged_attention
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import DENSE, DENSE_CODEC, FORMATS, CentroidType
from qvg_paged.kernels.lookahead import Lookahead, Step
from qvg_paged.kernels.rope import RoPELayout, RoPESpec

MIXED = [*FORMATS.values(), replace(FORMATS["qvg4-int2"], name="dense-values", value=DENSE_CODEC)]
TORCH_PATHS = [AttentionPath.REFERENCE, AttentionPath.STAGED]


pytestmark = pytest.mark.usefixtures("one_thread")


class Allocations(TorchDispatchMode):
    """Remembers the largest storage an operation returned, `known` ones aside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def randint(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def random_case(head_dim: int = 64, dtype: torch.dtype = torch.float32, layout: RoPELayout | None = None) -> Case:
    rows, columns = randint(1, 5), randint(1, 60)
    rope = None if layout is None else RoPESpec(head_dim=head_dim, grid=(rows, columns), layout=layout)
    sequences = [[randint(0, len(MIXED)) for _ in range(randint(1, 5))] for _ in range(2)]
    sequences.insert(randint(0, 3), [])
    entries = sum(map(len, sequences))
    positions = [float(p) for p in torch.randperm(200)[:entries]]
    return build_case(
        MIXED, sequences, tokens=rows * columns, head_dim=head_dim, dtype=dtype, rope=rope, positions=positions
    )


def random_queries(case: Case, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Ragged queries, one sequence possibly without any; a view with strided tokens and heads."""
    cu = [0]
    for _ in range(case.table.batch):
        cu.append(cu[-1] + randint(0, 40))
    cu[-1] += 1
    wide = torch.randn(cu[-1], 2, heads + 1, case.layouts[0].key.head_dim, dtype=dtype)
    return wide[:, 1, 1:], cu


@pytest.mark.parametrize("layout", [None, *RoPELayout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("path", TORCH_PATHS)
def test_attention_to_mixed_pages_is_as_good_as_pytorch_on_decoded_keys(
    path: AttentionPath, head_dim: int, dtype: torch.dtype, layout: RoPELayout | None
) -> None:
    case = random_case(head_dim, dtype, layout)
    q, cu = random_queries(case, 2, dtype)
    out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, rope=case.rope, path=path)
    assert out.shape == q.shape
    assert out.dtype == dtype
    case.check(q, cu, out, lse, head_dim**-0.5)


@pytest.mark.parametrize("path", TORCH_PATHS)
def test_query_heads_share_key_heads_in_groups(path: AttentionPath) -> None:
    case = random_case()
    q, cu = random_queries(case, 6, torch.float32)
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, softmax_scale=0.3, path=path
    )
    case.check(q, cu, out, lse, 0.3)


@pytest.mark.parametrize("layout", [None, *RoPELayout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_path_with_dense_pages_is_bit_identical_to_a_plain_cache(
    dtype: torch.dtype, layout: RoPELayout | None
) -> None:
    rope = None if layout is None else RoPESpec(head_dim=64, grid=(5, 7), layout=layout)
    case = build_case([DENSE], [[0] * 4, [0] * 2], tokens=35, dtype=dtype, rope=rope)
    q = torch.randn(60, 4, 64, dtype=dtype)
    out, _ = paged_attention(
        q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 35, 60], rope=rope, path=AttentionPath.REFERENCE
    )
    stored = Case(case.buffer, case.table, case.layouts, None)
    for b, rows in enumerate((slice(0, 35), slice(35, 60))):
        k, v = (x.to(dtype) for x in stored.history(b))
        if rope is not None:
            k = rope.rotate(k, [case.table.positions[i] for i in case.table.entries(b)])
        plain = [x.transpose(0, 1)[None] for x in (q[rows], k, v)]
        expected = F.scaled_dot_product_attention(*plain, scale=64**-0.5, enable_gqa=True)[0].transpose(0, 1)
        assert torch.equal(out[rows], expected)


@pytest.mark.parametrize("path", TORCH_PATHS)
def test_a_ragged_batch_gives_each_sequence_what_it_gets_alone(path: AttentionPath) -> None:
    case = random_case(layout=RoPELayout.INTERLEAVED)
    q, cu = random_queries(case, 2, torch.float32)

    def attend(one: Case, rows: slice, bounds: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return paged_attention(
            q[rows], one.buffer, one.table, one.layouts, 1, cu_seqlens_q=bounds, rope=one.rope, path=path
        )

    out, lse = attend(case, slice(None), cu)
    for b in range(case.table.batch):
        rows = slice(cu[b], cu[b + 1])
        alone, alone_lse = attend(case.sequence(b), rows, [0, cu[b + 1] - cu[b]])
        assert torch.equal(out[rows], alone)
        assert torch.equal(lse[rows], alone_lse)


def test_a_batch_of_equal_sequences_can_be_attended_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_plan, "_together", lambda _: True)
    rope = RoPESpec(head_dim=64, grid=(4, 5))
    case = build_case(MIXED, [[1, 1, 4, 0], [1, 1, 4, 0], [4, 0, 1, 1], [1, 0, 0, 0]], tokens=20, rope=rope)
    cu = [0, 8, 16, 24, 32]
    q = torch.randn(32, 4, 64)
    page = 2 * 20 * 2 * 64 * 4
    for pages in (2, 3, 7, 100):
        workspace = torch.empty(pages * page + q.numel() * 4, dtype=torch.uint8)
        out, lse = paged_attention(
            q, case.buffer, case.table, case.layouts, 1,
            cu_seqlens_q=cu, rope=rope, path=AttentionPath.STAGED, workspace=workspace,
        )  # fmt: skip
        case.check(q, cu, out, lse, 0.125)


@pytest.mark.parametrize("path", [AttentionPath.STAGED, AttentionPath.STAGED_FP8])
def test_sequences_of_different_lengths_share_slices_as_far_as_they_go(
    monkeypatch: pytest.MonkeyPatch, path: AttentionPath
) -> None:
    monkeypatch.setattr(staged_plan, "_together", lambda _: True)
    torch.manual_seed(0)  # E4M3 is off by more than a tenth in one of eighty cases
    formats = [DENSE, FORMATS["qvg-int2"]]
    case = build_case(formats, [[1, 0], [1] * 5 + [0] * 2, [], [1] * 3 + [0], [0], [1] * 5], tokens=20)
    cu, page = [0, 8, 16, 24, 32, 35, 43], 2 * 20 * 2 * 64 * 4
    q = torch.randn(43, 4, 64)
    sizes = []
    for pages in (30, 50, 120) if path is AttentionPath.STAGED_FP8 else (2, 5, 12, 60):
        workspace = torch.full((pages * page + q.numel() * 12,), 0xFF, dtype=torch.uint8)
        out, lse = paged_attention(
            q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, path=path, workspace=workspace
        )
        if path is AttentionPath.STAGED:
            case.check(q, cu, out, lse, 0.125)
        for b in (0, 1, 3, 4, 5):
            rows = slice(cu[b], cu[b + 1])
            exact, _ = exact_attention(q[rows], *case.history(b), 0.125)
            assert (out[rows].double() - exact).norm() < 0.1 * exact.norm()
        assert (out[cu[2] : cu[3]] == 0).all()
        (plan,) = [made for key, made in case.table.cache.items() if key[0] == "plan" and key[5] == workspace.numel()]
        assert sorted(cohort.sequences for cohort in plan.cohorts) == [(1, 5, 3, 0, 2), (4,)]
        sizes.append(len(plan.cohorts[0].slices))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 6  # pages that 4, 3 and 2 of them have in one format, that 1, 2 and 1 have in the other


@pytest.mark.parametrize(
    ("path", "together"),
    [(AttentionPath.STAGED, False), (AttentionPath.STAGED, True), (AttentionPath.STAGED_FP8, True)],
)
def test_a_workspace_for_one_sequence_serves_a_batch(
    monkeypatch: pytest.MonkeyPatch, path: AttentionPath, together: bool
) -> None:
    monkeypatch.setattr(staged_plan, "_together", lambda _: together)
    case = build_case([DENSE, FORMATS["qvg-int2"]], [[1, 1, 0]] * 3, tokens=9, dtype=torch.float16)
    cu = [0, 40, 80, 95]
    q = torch.randn(95, 4, 64).half()
    least = attention_workspace_nbytes(case.layouts, 4, 40, q.dtype)
    for nbytes in (least, least + 9000, least + 60000):
        out, lse = paged_attention(
            q, case.buffer, case.table, case.layouts, 1,
            cu_seqlens_q=cu, path=path, workspace=torch.empty(nbytes, dtype=torch.uint8),
        )  # fmt: skip
        if path is not AttentionPath.STAGED_FP8:
            case.check(q, cu, out, lse, 0.125)
        exact, _ = exact_attention(q[80:], *case.history(2), 0.125)
        assert (out[80:].double() - exact).norm() < 0.1 * exact.norm()


def test_the_least_workspace_suffices_for_pages_smaller_than_a_granule() -> None:
    case = build_case([DENSE], [[0, 0, 0]], tokens=1, heads=1, head_dim=32, dtype=torch.float16)
    q = torch.randn(2, 1, 32).half()
    workspace = torch.empty(attention_workspace_nbytes(case.layouts, 1, 2, q.dtype), dtype=torch.uint8)
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 2], path=AttentionPath.STAGED, workspace=workspace
    )
    case.check(q, [0, 2], out, lse, 32**-0.5)


def test_staged_slices_of_any_size_agree() -> None:
    case = random_case(layout=RoPELayout.HALF_SPLIT)
    q, cu = random_queries(case, 4, torch.float32)
    least = attention_workspace_nbytes(case.layouts, 4, len(q), torch.float32)
    for nbytes in (least, least + least // 3, 4 * least):
        out, lse = paged_attention(
            q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, rope=case.rope,
            path=AttentionPath.STAGED, workspace=torch.empty(nbytes, dtype=torch.uint8),
        )  # fmt: skip
        case.check(q, cu, out, lse, 0.125)


def test_staged_path_allocates_nothing_the_size_of_the_history() -> None:
    case = build_case([FORMATS["qvg-int2"]], [[0] * 64], tokens=64)
    q = torch.randn(4, 2, 64)
    workspace = torch.empty(attention_workspace_nbytes(case.layouts, 2, 4, torch.float32), dtype=torch.uint8)
    history = 64 * 64 * 2 * 64 * 4
    known = {x.untyped_storage().data_ptr() for x in (workspace, case.buffer)}
    with Allocations(known) as seen:
        paged_attention(
            q, case.buffer, case.table, case.layouts, 1,
            cu_seqlens_q=[0, 4], path=AttentionPath.STAGED, workspace=workspace,
        )  # fmt: skip
    assert 0 < seen.largest < history // 8


def test_one_token_pages_and_fp8_centroids_are_read() -> None:
    formats = [fmt.with_codecs(centroid_type=CentroidType.FP8) for fmt in MIXED]
    for tokens in (1, 2, 3):
        case = build_case(formats, [list(range(len(formats)))], tokens=tokens)
        q = torch.randn(3, 2, 64)
        for path in TORCH_PATHS:
            out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 3], path=path)
            case.check(q, [0, 3], out, lse, 0.125)


def test_a_batch_without_pages_or_queries_is_empty() -> None:
    case = build_case([DENSE], [[], []], tokens=4)
    q = torch.randn(3, 2, 64)
    for path in TORCH_PATHS:
        out, lse = paged_attention(q, case.buffer, case.table, case.layouts, 0, cu_seqlens_q=[0, 1, 3], path=path)
        case.check(q, [0, 1, 3], out, lse, 0.125)
        out, lse = paged_attention(q[:0], case.buffer, case.table, case.layouts, 0, cu_seqlens_q=[0, 0, 0], path=path)
        assert out.shape == (0, 2, 64)
        assert lse.shape == (0, 2)


def test_what_a_table_needs_on_the_device_is_uploaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(layout=RoPELayout.INTERLEAVED)
    q, cu = random_queries(case, 2, torch.float32)
    paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, rope=case.rope)
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(RoPESpec, "tables", None)
    paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=cu, rope=case.rope)


@pytest.mark.parametrize("path", [AttentionPath.STAGED, AttentionPath.DIRECT])
def test_a_workspace_too_small_says_how_many_bytes_are_needed(path: AttentionPath) -> None:
    case = build_case([DENSE], [[0, 0]], tokens=32)
    q = torch.randn(8, 2, 64)
    with pytest.raises(ArgumentError, match=r"workspace: expected at least (\d+) bytes") as caught:
        paged_attention(
            q, case.buffer, case.table, case.layouts, 0,
            cu_seqlens_q=[0, 8], path=path, workspace=torch.empty(64, dtype=torch.uint8),
        )  # fmt: skip
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    assert needed <= attention_workspace_nbytes(case.layouts, 2, 8, torch.float32)


GOOD = {"cu_seqlens_q": [0, 6], "layer": 0}
BAD: list[tuple[str, dict[str, object]]] = [
    ("q", {"q": torch.zeros(6, 2, 32)}),
    ("q", {"q": torch.zeros(6, 3, 64)}),
    ("q", {"q": torch.zeros(6, 64)}),
    ("q", {"q": torch.zeros(6, 2, 64, dtype=torch.float64)}),
    ("q", {"q": torch.zeros(6, 2, 64, requires_grad=True)}),
    ("layer", {"layer": 2}),
    ("layer", {"layer": -1}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 3, 6]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [0, 5]}),
    ("cu_seqlens_q", {"cu_seqlens_q": [1, 6]}),
    ("softmax_scale", {"softmax_scale": 0.0}),
    ("rope", {"rope": RoPESpec(head_dim=64, grid=(3, 3))}),
    ("rope", {"rope": RoPESpec(head_dim=32, grid=(2, 4))}),
    ("workspace", {"workspace": torch.zeros(1 << 20)}),
    ("workspace", {"workspace": torch.zeros(1 << 20, dtype=torch.uint8, device="meta")}),
    ("workspace", {"workspace": torch.zeros(1 << 20, dtype=torch.uint8)[1:]}),
    ("table", {"table": BlockTable((1,), (-1,), (0,), (0.0,), (0, 1), torch.device("meta"))}),
    ("layouts", {"layouts": []}),
    ("buffer", {"buffer": torch.zeros(1 << 20)}),
]


@pytest.mark.parametrize(("name", "changes"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_arguments_are_named(name: str, changes: dict[str, object]) -> None:
    case = build_case([DENSE], [[0]], tokens=8)
    given: dict[str, object] = {"q": torch.randn(6, 2, 64), "buffer": case.buffer, "table": case.table}
    given |= {"layouts": case.layouts, **GOOD, **changes}
    with pytest.raises(ArgumentError, match=f"^{name}: expected"):
        paged_attention(**given)  # type: ignore[arg-type]


def test_a_table_with_an_unknown_format_is_refused() -> None:
    case = build_case([DENSE], [[0]], tokens=8)
    table = BlockTable((1,), (-1,), (3,), (0.0,), (0, 1), torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"^table: expected formats 0 to 0"):
        paged_attention(torch.randn(6, 2, 64), case.buffer, table, case.layouts, 0, cu_seqlens_q=[0, 6])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("pages", [4, 7, 12, 30])
def test_slices_that_overlap_leave_alone_what_is_attended_to(
    monkeypatch: pytest.MonkeyPatch, pages: int, first: int
) -> None:
    """Pages are decoded as early as a side stream may decode them: before attention to the slice before."""
    decoded = []

    def early(steps: Sequence[Step], *_: object, **__: object) -> Iterator[tuple[int, int]]:
        steps[0].decode(first, None)
        for i, step in enumerate(steps):
            step.complete((first + i) % 2)
            for following in steps[i + 1 : i + 2]:
                following.decode((first + i + 1) % 2, None)
            yield i, (first + i) % 2
        decoded.append(len(steps))

    monkeypatch.setattr(staged_plan, "_together", lambda _: True)
    monkeypatch.setattr(staged_attention, "staged", early)
    rope = RoPESpec(head_dim=64, grid=(4, 5))
    case = build_case(MIXED, [[1] * 5 + [4] * 3 + [0] * 2], tokens=20, rope=rope)
    q, cu = torch.randn(8, 4, 64), [0, 8]
    workspace = torch.full((pages * 2 * 20 * 2 * 64 * 4 + q.numel() * 4,), 0xFF, dtype=torch.uint8)
    out, lse = paged_attention(
        q, case.buffer, case.table, case.layouts, 1,
        cu_seqlens_q=cu, rope=rope, path=AttentionPath.STAGED, workspace=workspace, lookahead=Lookahead(),
    )  # fmt: skip
    case.check(q, cu, out, lse, 0.125)
    assert decoded == [{4: 3, 7: 2, 12: 1, 30: 1}[pages]]
