"""The benchmark: what it counts, that wrong results have no time, and that every part runs without a GPU."""

import json
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qvg_paged import AttentionPath, cli
from qvg_paged.kernels.dispatch import DispatchTable, Workload, table_for

runner = CliRunner()
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bench() -> SimpleNamespace:
    """Modules of the benchmark."""
    names = ("bounds", "gate", "history", "plot", "roofline", "rows", "run", "timing", "xformers_paged")
    return SimpleNamespace(**{name: cli._benchmark(f"bench.{name}") for name in names})


def a_clock(bench: SimpleNamespace) -> Any:
    return bench.timing.Clock(CPU, seconds=0.001, least=3)


def ceilings(bench: SimpleNamespace) -> Any:
    """2 TB/s, 10 TFLOP/s in BF16, 20 in FP8."""
    return bench.roofline.Ceilings(copy=2e12, products={"bf16": 1e13, "fp8": 2e13})


@pytest.mark.parametrize("part", ["attention", "encode", "decode", "manager"])
def test_every_part_runs_on_a_cpu_and_writes_rows_of_one_schema(part: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    arguments = ["bench", part, "--quick", "--device", "cpu", "--out", str(tmp_path / "run"), "--json", str(file)]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["schema"] == "qvg-paged.result/1"
    assert {"command", "commit", "date", "device", "versions", "config", "warnings"} <= content.keys()
    results = content["results"]
    assert {row["part"] for row in results["rows"]} == {part}
    assert results["ceilings"]["copy"] > 0
    assert results["not_started"] == []
    for row in results["rows"]:
        assert row["error"] is None
        assert row["baseline"] in row["systems"]
        assert row["name"] in result.output
        for system in row["systems"].values():
            check_system(system)
    assert (tmp_path / "run" / "result.json").exists()
    shown = cli._benchmark("readme_tables").TABLES["bench"][2](content)
    assert all((row["name"] in shown) is (part != "manager") for row in results["rows"])
    assert (tmp_path / "run" / "plot.png").read_bytes().startswith(b"\x89PNG")


def check_system(system: dict[str, Any]) -> None:
    """A system has a spread around its median, a gate it passed, and is not counted faster than its work allows."""
    timing = system["timing"]
    assert system["error"] is None
    assert 0 < timing["p10_ms"] <= timing["median_ms"] <= timing["p90_ms"]
    assert timing["count"] >= 3
    assert system["gate"] is None or system["gate"]["error"] <= system["gate"]["allowed"]
    if "least_ms" in system:
        assert system["roofline_share"] == pytest.approx(system["least_ms"] / timing["median_ms"])
        assert system["tflops"] == pytest.approx(system["flops"] / timing["median_ms"] / 1e9)


def test_results_so_far_can_be_kept_while_it_runs(bench: SimpleNamespace) -> None:
    seen = [
        (len(results["rows"]), len(results["not_started"]))
        for results in bench.run.run(bench.run.BenchOptions(parts=("manager",), quick=True))
    ]
    assert seen == [(1, 3), (2, 2), (3, 1), (4, 0)]


def test_rows_are_not_started_after_the_time_is_up(bench: SimpleNamespace) -> None:
    (results,) = bench.run.run(bench.run.BenchOptions(parts=("manager",), seconds=0))
    assert results["rows"] == []
    assert len(results["not_started"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decoding"], "what: expected any of attention, encode, decode, manager, got decoding"),
        (["--only", "no such row"], "only: expected part of a row's name"),
        (["--device", "tpu"], "error: device: expected cpu, or cuda"),
        (["manager", "--official", "nowhere"], "error: official: expected"),
    ],
)
def test_bad_options_are_one_line_and_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["bench", *arguments, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()


def test_attention_counts_two_products_and_every_byte_once(bench: SimpleNamespace) -> None:
    queries, keys, heads, dim = 4680, 28080, 12, 128
    work = bench.roofline.attention_work(queries * keys, queries, heads, dim, history_nbytes=1000)
    assert work.flops == 4 * queries * keys * dim * heads
    assert work.nbytes == 1000 + 2 * queries * heads * dim * 2


def test_the_roofline_is_the_longer_of_products_and_bytes(bench: SimpleNamespace) -> None:
    machine, work = ceilings(bench), bench.roofline.Work
    assert machine.least_ms(work(1e13, 0)) == pytest.approx(1000)
    assert machine.least_ms(work(1e13, 0, "fp8")) == pytest.approx(500)
    assert machine.least_ms(work(1e10, 2e12)) == pytest.approx(1000)
    assert (machine.binds(work(1e13, 1e9)), machine.binds(work(1e9, 1e12))) == ("products", "bytes")


def test_medians_and_spread_are_quantiles(bench: SimpleNamespace) -> None:
    timing = bench.timing.summary([float(value) for value in range(101, 0, -1)], [1e-6, 3e-6, 2e-6])
    assert (timing.median_ms, timing.p10_ms, timing.p90_ms, timing.count) == (51.0, 11.0, 91.0, 101)
    assert timing.host_us == pytest.approx(2)


def case_of(bench: SimpleNamespace, *systems: Any) -> Any:
    return bench.rows.Case("attention", "a row", {}, lambda: iter(systems), systems[0].name, ("chunk loop",))


def test_a_wrong_result_has_no_time_and_an_exception_stays_in_its_system(bench: SimpleNamespace) -> None:
    def broken(_: int) -> None:
        raise RuntimeError("no such kernel")

    rows = bench.rows
    right = rows.System("right", lambda _: 1.0, check=lambda out: rows.Gate(out == 1.0, 0.0, 0.1, "one"))
    wrong = rows.System("wrong", lambda _: 2.0, check=lambda out: rows.Gate(out == 1.0, 1.0, 0.1, "one"))
    row = rows.run_case(case_of(bench, right, wrong, rows.System("broken", broken)), a_clock(bench), ceilings(bench))
    assert row["systems"]["right"]["timing"]["count"] >= 3
    assert row["systems"]["wrong"]["timing"] is None
    assert row["systems"]["wrong"]["error"] == "wrong: error 1, allowed 0.1"
    assert row["systems"]["broken"]["error"].startswith("RuntimeError: no such kernel (test_bench.py:")
    assert row["error"] is None
    assert rows.median_ms(row, "wrong", "broken") is None


def test_systems_of_a_row_take_turns_and_one_that_fails_drops_out(bench: SimpleNamespace) -> None:
    called: list[str] = []

    def system(name: str, calls: float = float("inf")) -> Any:
        def run(_: int) -> None:
            if called.count(name) >= calls:
                raise RuntimeError("no more")
            called.append(name)

        return bench.rows.System(name, run)

    case = bench.rows.Case("attention", "a row", {}, lambda: iter([system("a"), system("b", 6)]), "a", turns=3)
    row = bench.rows.run_case(case, bench.timing.Clock(CPU, seconds=0.0, least=3), ceilings(bench))
    assert [name for name, _ in groupby(called)] == ["a", "b", "a", "b", "a"]
    assert row["systems"]["a"]["timing"]["count"] == 9
    assert row["systems"]["b"]["timing"] is None
    assert row["systems"]["b"]["error"].startswith("RuntimeError: no more")


def test_inputs_that_cannot_be_made_cost_their_row_only(bench: SimpleNamespace) -> None:
    def systems() -> Any:
        yield bench.rows.System("first", lambda _: None)
        raise MemoryError("too large")

    row = bench.rows.run_case(
        bench.rows.Case("attention", "a row", {}, systems, "first"), a_clock(bench), ceilings(bench)
    )
    assert row["systems"]["first"]["timing"]
    assert row["error"].startswith("MemoryError: too large")


@pytest.mark.parametrize("rope", [False, True])
def test_the_gate_passes_a_right_path_and_no_perturbed_one(bench: SimpleNamespace, rope: bool) -> None:
    spec = bench.history.HistorySpec((5, 3), 64, 2, 64, rope=rope)
    history = bench.history.History.filled(spec, CPU)
    q, cu = torch.randn(48, 4, 64).bfloat16(), (0, 32, 48)
    gate = bench.gate.AttentionGate(q, cu, 2, history.truth)
    attention = cli._benchmark("bench.attention")
    out = attention.paged_call(q, history, cu, AttentionPath.STAGED, None)(0)
    dense = attention.paged_call(q, history.dense_pages(), cu, AttentionPath.STAGED, None)(0)
    assert gate.check(out).passed
    assert gate.check(dense).passed
    assert not gate.check(out * 1.02).passed
    assert not gate.check(out.roll(1, 1)).passed
    assert not gate.check(out.roll(1, 1), bench.gate.Precision.FP8).passed
    assert not gate.check(torch.full_like(out, float("nan")), bench.gate.Precision.EITHER).passed


def bound_row(name: str, bounds: list[str], **times: float) -> dict[str, Any]:
    systems = {key.replace("_", " "): {"timing": {"median_ms": value}} for key, value in times.items()}
    return {"name": name, "bounds": bounds, "systems": systems}


def test_bounds_hold_medians_or_every_row(bench: SimpleNamespace) -> None:
    names = ["staged, RoPE on read", "released read + cuDNN"]
    rows = [
        bound_row(str(ratio), names, staged=1.0, auto=1.0, cuDNN=ratio, **{"released read + cuDNN": ratio})
        for ratio in (0.9, 1.5, 1.2)
    ]
    found = {bound["bound"]: bound for bound in bench.bounds.judge(rows)}
    assert set(found) == set(names)
    assert (found[names[0]]["value"], found[names[0]]["held"]) == (1.2, True)
    assert (found[names[1]]["value"], found[names[1]]["held"]) == (0.9, False)
    assert found[names[1]]["rows"] == {"0.9": 0.9, "1.5": 1.5, "1.2": 1.2}


def test_a_bound_without_a_measured_row_is_not_held(bench: SimpleNamespace) -> None:
    (bound,) = bench.bounds.judge([bound_row("a row", ["chunk loop"], auto=1.0)])
    assert (bound["value"], bound["held"]) == (None, False)


def test_costs_are_held_from_above(bench: SimpleNamespace) -> None:
    bound = bench.bounds.BOUNDS["bookkeeping"]
    assert bound.held_by(bound.required)
    assert not bound.held_by(bound.required + 1)


def test_rows_name_bounds_that_exist_and_every_bound_has_rows(bench: SimpleNamespace) -> None:
    settings = cli._benchmark("bench.settings")
    one = settings.Bench(bench.run.BenchOptions(device="cuda"))
    cases = list(bench.run.cases(one))
    named = {bound for case in cases for bound in case.bounds}
    assert named == set(bench.bounds.BOUNDS)
    assert len({(case.part, case.name) for case in cases}) == len(cases)


def test_pages_for_xformers_read_back_as_they_are_packed(bench: SimpleNamespace) -> None:
    x = torch.randn(3, 5, 64)
    rows, read = bench.xformers_paged.int4_rows(x)
    scale, shift = rows[..., :1].contiguous().view(torch.float16).float().unbind(-1)
    codes = (rows[..., 1:, None] >> (4 * torch.arange(8)) & 15).flatten(-2)
    torch.testing.assert_close(codes * scale[..., None] + shift[..., None], read)
    assert (read - x).abs().max() <= scale.max() * 0.51
    rows, coefficients, read = bench.xformers_paged.fp8_rows(x)
    scale = (coefficients & 0xFFFF).short().view(torch.float16).float()
    torch.testing.assert_close(rows.view(torch.float8_e4m3fn).float() * scale[..., None], read)
    assert (read - x).norm() / x.norm() < 0.05


def test_tuning_writes_the_table_that_auto_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVG_PAGED_CACHE", str(tmp_path / "cache"))
    table_for.cache_clear()
    file = tmp_path / "table.json"
    result = runner.invoke(cli.app, ["bench", "--tune", "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert table_for("cpu") == DispatchTable.load(file)
    assert len(DispatchTable.load(file).rows) == 4
    load = Workload(queries=16, keys=256, heads=2, head_dim=64, format="qvg4-int2", rope=True)
    assert table_for("cpu").choose(load, [AttentionPath.STAGED]) is AttentionPath.STAGED
    table_for.cache_clear()


def test_runs_of_one_machine_are_one_result_and_rows_measured_twice_are_refused(tmp_path: Path) -> None:
    files = []
    for part in ("manager", "decode"):
        files.append(tmp_path / f"{part}.json")
        arguments = ["bench", part, "--quick", "--device", "cpu", "--out", str(tmp_path), "--json", str(files[-1])]
        assert runner.invoke(cli.app, arguments).exit_code == 0
    manager, decode = (json.loads(file.read_text()) for file in files)
    join = cli._benchmark("bench_together").together
    both = join([manager, decode])
    assert both["results"]["rows"] == manager["results"]["rows"] + decode["results"]["rows"]
    assert [row["bound"] for row in both["results"]["bounds"]] == [r["bound"] for r in manager["results"]["bounds"]]
    with pytest.raises(ValueError, match="got twice"):
        join([manager, manager])
    with pytest.raises(ValueError, match="commit"):
        join([manager, {**decode, "commit": "another"}])
