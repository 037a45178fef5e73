"""`qvg-paged stress`: options, reports, comparison, shrinking, and the same workloads on the real cache."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qvg_paged import ArgumentError
from qvg_paged.cli import app
from qvg_paged.scheduler import SchedulerConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.command import StressOptions, execute, make_scenario  # noqa: E402
from stress.compare import compare, read_result  # noqa: E402
from stress.coverage import missing_faults, print_matrix  # noqa: E402
from stress.metrics import measure  # noqa: E402
from stress.mutants import MUTANTS, planted  # noqa: E402
from stress.on_manager import run_on_manager  # noqa: E402
from stress.presets import PRESETS  # noqa: E402
from stress.rated import ServiceLevel, curve, rated_load  # noqa: E402
from stress.scenario import Scenario  # noqa: E402
from stress.series import curves  # noqa: E402
from stress.shrink import find_failure, shrink  # noqa: E402
from stress.simulator import simulate  # noqa: E402
from stress.stats import bootstrap  # noqa: E402

SMALL = Scenario(policy="fair-share", streams=24, load=1.5, pool_streams=2.5, frames=(6, 30), fps=0.5)
DAMAGE = ("park fails", "disk full", "disk fails", "file truncated", "bit flipped", "nan", "encoding fails",
          "out of memory", "chunk fails", "stream fails", "double free", "stale handle")  # fmt: skip


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["stress", *words])
    return result.exit_code, result.output


def test_the_command_writes_a_report_a_result_and_the_events_and_a_seed_replays(tmp_path: Path) -> None:
    words = ["--seeds", "1", "--streams", "12", "--faults", "chunk fails=0.2", "--no-load-curve"]
    outputs = []
    for name in ("a", "b"):
        code, output = run(*words, "--out", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json"))
        assert code == 0, output
        outputs.append([line for line in output.splitlines() if "decision log" in line])
    assert outputs[0] == outputs[1] != []
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["schema"].startswith("qvg-paged.result/")
    found = content["results"]["runs"][0]
    assert found["digest"] in outputs[0][0]
    assert found["violations"] == 0
    assert found["metrics"]["decision_p99_seconds"] > 0
    report = (tmp_path / "a" / "report.html").read_text()
    assert report.count("data:image/svg+xml;base64,") == 7
    assert 'src="http' not in report
    assert found["digest"][:16] in report
    lines = (tmp_path / "a" / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["kind"] == "open"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scenario", "never"], "scenario: expected one of steady"),
        (["--streams", "2000"], "streams: expected 1 to 1000, got 2000"),
        (["--tenants", "0"], "tenants: expected 1 to 100, got 0"),
        (["--arrivals", "never"], "arrivals: expected one of poisson"),
        (["--model", "never"], "model: expected one of self-forcing"),
        (["--policy", "never"], "policy: expected one of"),
        (["--faults", "never"], "faults: expected all or one of"),
        (["--faults", "nan=2"], "expected a rate from 0 to 1"),
        (["--faults", "nan=x"], "expected a rate from 0 to 1"),
        (["--load", "0"], "load: expected"),
        (["--backend", "never"], "backend: expected one of simulator, manager"),
        (["--geometry", "never"], "geometry: expected one of reduced, real"),
    ],
)
def test_bad_options_are_told_in_one_line_and_exit_with_2(words: list[str], message: str, tmp_path: Path) -> None:
    code, output = run(*words, "--out", str(tmp_path))
    assert code == 2
    assert message in output.replace("\n", " ")


def test_options_change_the_scenario(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time,tenant,frames,patience\r\n1.0,b,6,2.5\r\n0.5,a,9\r\n", encoding="utf-8-sig")
    options = StressOptions(trace=trace, policy="fcfs", max_running=4, oversubscription=2.0, faults=["all=0.01"])
    scenario = make_scenario(options, 0)
    assert [(arrival.at, arrival.tenant, arrival.patience) for arrival in scenario.trace] == [
        (0.5, "a", None),
        (1.0, "b", 2.5),
    ]
    assert (scenario.policy, scenario.config.max_running, scenario.pool_streams) == ("fcfs", 4, 2.0)
    assert set(scenario.faults.values()) == {0.01}
    assert make_scenario(StressOptions(scenario="flood"), 3).trace
    assert not make_scenario(StressOptions(scenario="flood", streams=9), 3).trace
    assert make_scenario(StressOptions(scenario="swarm"), 3) != make_scenario(StressOptions(scenario="swarm"), 4)


def test_a_difference_within_the_noise_is_none_and_a_real_one_has_a_side(tmp_path: Path) -> None:
    paths = []
    for name, seconds in (("same", None), ("again", None), ("slow", 4.0)):
        options = StressOptions(seeds=4, streams=12, load_curve=False, chunk_seconds=seconds, out=tmp_path / name)
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"results": execute(options)}, default=str))
    same, again, slow = map(read_result, paths)
    verdicts = {d.name: d.verdict for d in compare(same, again) if not d.name.startswith("decision")}
    assert set(verdicts.values()) == {"no difference"}
    assert {d.name: d.verdict for d in compare(same, slow)}["first_chunk_p50_seconds"] == "worse"
    assert {d.name: d.verdict for d in compare(slow, same)}["first_chunk_p50_seconds"] == "better"
    same["results"]["runs"] = same["results"]["runs"][:2]
    with pytest.raises(ArgumentError, match="at least 3"):
        compare(same, slow)
    with pytest.raises(ArgumentError, match="expected a result file"):
        read_result(tmp_path / "same" / "events.jsonl")
    code, output = run("compare", str(paths[0]), str(paths[2]))
    assert code == 0
    assert "worse" in output


def test_intervals_shrink_with_the_number_of_observations() -> None:
    few, many = ([float(value % 7) for value in range(count)] for count in (7, 700))
    low, high = bootstrap(few)
    closer_low, closer_high = bootstrap(many)
    assert low < 3.0 < high
    assert closer_high - closer_low < (high - low) / 5
    assert bootstrap([2.0]) == (2.0, 2.0)
    assert bootstrap([]) == (0.0, 0.0)


def test_a_failure_is_told_with_seed_and_step_and_shrunk() -> None:
    mutant = next(m for m in MUTANTS if m.about == "growth is not reserved")
    scenario = replace(SMALL, frames=(6, 60), faults={"clock forward": 0.05, "cancel unknown": 0.1})
    assert find_failure(scenario, 1) is None
    with planted(mutant):
        failure = find_failure(scenario, 1)
        assert failure is not None
        smaller = shrink(failure, tries=20)
        assert smaller.invariant == failure.invariant
        assert smaller.scenario.streams < failure.scenario.streams
        assert smaller.step > 0
        assert find_failure(smaller.scenario, smaller.seed) == smaller
    assert find_failure(smaller.scenario, smaller.seed) is None


def test_the_rated_load_holds_the_service_level_and_more_does_not() -> None:
    scenario = replace(PRESETS["steady"], streams=40)
    level = ServiceLevel()
    rated = rated_load(scenario, [0], level, precision=0.1)
    batch = scenario.costs.batch(8)
    assert 0.1 < rated < 1.5
    assert level.holds(measure(simulate(replace(scenario, load=rated), 0).lines), batch)
    assert not level.holds(measure(simulate(replace(scenario, load=3.0), 0).lines), batch)
    assert not ServiceLevel(first_chunk_seconds=-10.0).holds(measure(simulate(scenario, 0).lines), batch)
    rows = curve(scenario, [0], loads=(0.4, 0.8))
    assert rows[0]["chunks_per_second_under_load"] < rows[1]["chunks_per_second_under_load"]


def test_curves_follow_the_pool_and_add_up() -> None:
    simulated = simulate(SMALL, 2)
    found = curves(simulated.lines, points=50)
    count = len(found["seconds"])
    assert 10 < count <= 50
    assert found["seconds"] == sorted(found["seconds"])
    assert max(found["formats"]["quantised"]) > 0
    assert all(len(values) == count for group in ("formats", "tenants", "service") for values in found[group].values())
    used = [sum(values) for values in zip(*found["formats"].values(), strict=True)]
    promised = [sum(values) for values in zip(*found["tenants"].values(), strict=True)]
    assert all(least <= most for least, most in zip(used, promised, strict=True))


def test_viewers_leave_when_their_patience_ends(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("0.5,a,30,3.0\n0.6,a,6\n")
    simulated = simulate(make_scenario(StressOptions(trace=trace), 0), 0)
    cancels = [json.loads(line)["id"] for line in simulated.lines if '"kind":"cancel"' in line]
    assert cancels == ["s1"]
    assert simulated.drained


def test_the_real_cache_survives_every_kind_of_damage() -> None:
    fired: Counter[tuple[str, str]] = Counter()
    rates = {**dict.fromkeys(DAMAGE, 0.06), **dict.fromkeys(DAMAGE[:5], 0.3)}
    scenario = replace(
        SMALL, streams=20, frames=(12, 40), policy="evicts-the-leader", faults=rates,
        config=SchedulerConfig(policy_strikes=1000),
    )  # fmt: skip
    for seed in range(8):
        done = run_on_manager(scenario, seed, "cpu")
        assert done.drained
        assert measure(done.lines).violations == []
        fired.update(done.fired)
    assert {fault for fault, _ in fired} >= set(DAMAGE)
    assert {"running", "parking", "resuming"} <= {phase for _, phase in fired}
    assert "running" in print_matrix(fired)
    assert "flood" in missing_faults(fired)


def test_streams_of_the_real_cache_come_back_from_host_and_disk_as_they_left(tmp_path: Path) -> None:
    options = StressOptions(
        scenario="oversubscribed", backend="manager", seeds=1, streams=12, pool_streams=1.6, load=3.0, out=tmp_path
    )
    found = execute(options)
    assert found["failures"] == []
    assert found["runs"][0]["metrics"]["parks_per_chunk"] > 0
