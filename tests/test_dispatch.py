"""Choosing a path: measured rows first, a rule elsewhere, tables on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_case import build_case

from qvg_paged import CacheConfig
from qvg_paged.kernels import attention, dispatch
from qvg_paged.kernels.attention import AttentionPath, paged_attention
from qvg_paged.kernels.dispatch import DispatchRow, DispatchTable, Workload, cache_file, table_for
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.formats import FORMATS

STAGED, FP8, DIRECT = AttentionPath.STAGED, AttentionPath.STAGED_FP8, AttentionPath.DIRECT
EVERY = (STAGED, FP8, DIRECT)
CALL = Workload(queries=4680, keys=28000, heads=12, head_dim=128, format="qvg4-int2", rope=False)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("QVG_PAGED_CACHE", str(tmp_path))
    table_for.cache_clear()
    yield tmp_path
    table_for.cache_clear()


def measured(workload: Workload, **times: float) -> DispatchRow:
    return DispatchRow(
        workload=workload, milliseconds=tuple((AttentionPath[name], time) for name, time in times.items())
    )


def test_a_table_without_rows_reads_directly_for_few_queries_and_decodes_for_many() -> None:
    table = DispatchTable(device="x")
    few = replace(CALL, queries=16)
    assert table.choose(few, EVERY) is DIRECT
    assert table.choose(few, (STAGED,)) is STAGED
    assert table.choose(CALL, EVERY) is STAGED
    assert table.choose(CALL, (FP8,)) is FP8


def test_the_fastest_allowed_path_of_the_nearest_row_is_chosen() -> None:
    small, large = replace(CALL, queries=64), replace(CALL, queries=9360)
    rows = (measured(small, STAGED=2.0, DIRECT=1.0), measured(large, STAGED=1.0, STAGED_FP8=0.7, DIRECT=3.0))
    table = DispatchTable(device="x", rows=rows)
    assert table.choose(replace(CALL, queries=100), EVERY) is DIRECT
    assert table.choose(CALL, EVERY) is FP8
    assert table.choose(CALL, (STAGED, DIRECT)) is STAGED
    assert table.choose(replace(CALL, queries=100), (FP8,)) is FP8


def test_a_row_of_the_same_kind_beats_one_of_the_same_size() -> None:
    rows = (measured(replace(CALL, rope=True), STAGED=1.0), measured(replace(CALL, queries=2000), DIRECT=1.0))
    assert DispatchTable(device="x", rows=rows).choose(CALL, EVERY) is DIRECT


def test_a_saved_table_is_read_back_and_found_in_the_cache_folder() -> None:
    table = DispatchTable(device="NVIDIA H200", rows=(measured(CALL, STAGED=1.5, STAGED_FP8=1.25),))
    path = table.save(cache_file(table.device))
    assert path.name == "dispatch_h200.json"
    assert DispatchTable.load(path) == table
    assert table_for("NVIDIA H200") == table


def test_shipped_tables_can_be_read() -> None:
    for path in dispatch.SHIPPED.glob("dispatch_*.json"):
        assert DispatchTable.load(path).rows


@pytest.mark.parametrize("damage", ["", "[]", "schema", "path", "time"])
def test_a_damaged_table_is_named(damage: str) -> None:
    path = DispatchTable(device="x", rows=(measured(CALL, STAGED=1.5),)).save(cache_file("x"))
    content = json.loads(path.read_text())
    if damage == "schema":
        content["schema"] = "other/1"
    if damage == "path":
        content["rows"][0]["milliseconds"] = {"teleport": 1.0}
    if damage == "time":
        content["rows"][0]["milliseconds"] = {"staged": -1.0}
    path.write_text(json.dumps(content) if damage.isalpha() else damage)
    with pytest.raises(ArgumentError, match="expected a dispatch table"):
        table_for("x")


def test_fp8_is_an_option_that_falls_back_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_fp8_attention", lambda _: False)
    assert CacheConfig(memory="1GiB", path="staged-fp8").path is FP8
    assert CacheConfig(memory="1GiB").allow_fp8
    case = build_case([FORMATS["qvg4-int2"]], [[0, 0]], tokens=8)
    q = torch.randn(3, 2, 64)
    exact, _ = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 3], path=STAGED)
    out, _ = paged_attention(q, case.buffer, case.table, case.layouts, 1, cu_seqlens_q=[0, 3], path=FP8)
    assert torch.equal(out, exact)
