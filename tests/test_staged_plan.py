"""How calls of the size that the bounds name are cut into slices; nothing is computed."""

from itertools import accumulate

import pytest
import torch

from qvg_paged.kernels import fp8_attention, staged_plan
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.kernels.layout import PageLayout
from qvg_paged.kernels.partials import PENDING
from qvg_paged.kernels.staged_plan import Plan, make_plan

TOKENS = 1560
SCRATCH = {12: 256 << 20, 40: 1024 << 20}
RAGGED = [6, 9, 12, 15, 19, 22, 25, 28]


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_plan, "_together", lambda _: True)


def planned(frames: list[int], heads: int, queries: int, *, fp8: bool = False, keeps: bool = True) -> Plan:
    layout = PageLayout.build(
        FORMATS["qvg4-int2"], num_layers=1, tokens=TOKENS, heads=heads, head_dim=128, dtype=torch.bfloat16,
        span_tokens=24 * TOKENS,
    )  # fmt: skip
    count, cu = sum(frames), tuple(range(0, queries * len(frames) + 1, queries))
    table = BlockTable(
        pages=tuple(range(count)), codebooks=(0,) * count, formats=(0,) * count,
        positions=tuple(map(float, range(count))), indptr=(0, *accumulate(frames)), device=torch.device("cpu"),
    )  # fmt: skip
    q = torch.empty(cu[-1], heads, 128, dtype=torch.bfloat16, device="meta")
    return make_plan(q, table, [layout], cu, None, SCRATCH[heads], fp8, keeps)


def sizes(plan: Plan) -> list[list[int]]:
    return [[piece.count for piece in cohort.slices] for cohort in plan.cohorts]


@pytest.mark.parametrize("queries", [1560, 4680, 9360])
@pytest.mark.parametrize(
    ("frames", "heads", "slices"),
    [(18, 12, [18]), (53, 12, [13, 13, 13, 14]), (18, 40, [18]), (53, 40, [17, 18, 18]), (28, 12, [14, 14])],
)
def test_a_history_takes_few_slices_and_decoded_pages_the_whole_scratch(
    frames: int, heads: int, slices: list[int], queries: int
) -> None:
    plan = planned([frames], heads, queries)
    assert sizes(plan) == [slices]
    assert not plan.running
    assert plan.capacity * 2 * TOKENS * heads * 128 * 2 <= plan.scratch <= SCRATCH[heads]
    assert plan.widest <= plan.capacity
    assert len(slices) <= PENDING


def test_what_no_attention_hides_is_decoded_first_in_a_short_slice() -> None:
    assert sizes(planned([18], 12, 4680, keeps=False)) == [[4, 14]]


@pytest.mark.parametrize(("shares", "running"), [(1, False), (2, True)])
def test_fp8_has_a_running_output_only_where_partial_results_are_many(
    monkeypatch: pytest.MonkeyPatch, shares: int, running: bool
) -> None:
    monkeypatch.setattr(fp8_attention, "num_splits", lambda *_: shares)
    plan = planned([53], 12, 9360, fp8=True)
    assert plan.running == running
    assert sizes(plan) == [[13, 13, 13, 14] if running else [17, 18, 18]]


@pytest.mark.parametrize(("fp8", "queries", "alone"), [(False, 1560, False), (False, 4680, True), (True, 1560, True)])
def test_sequences_whose_queries_fill_the_machine_go_one_after_another(fp8: bool, queries: int, alone: bool) -> None:
    plan = planned(RAGGED, 12, queries, fp8=fp8)
    assert len(plan.cohorts) == (len(RAGGED) if alone else 1)
    total = sum(piece.count for cohort in plan.cohorts for piece in cohort.slices)
    assert total == sum(RAGGED)
