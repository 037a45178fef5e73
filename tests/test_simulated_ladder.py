"""The ladder in the simulator: it reckons as the real cache does, it helps, and the checker holds it to its rules."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from stress.calibration import measured_costs  # noqa: E402
from stress.checker import check_log  # noqa: E402
from stress.command import StressOptions, make_scenario  # noqa: E402
from stress.ladder_cache import LADDERS, LadderCache  # noqa: E402
from stress.metrics import measure  # noqa: E402
from stress.models import MODELS, Costs  # noqa: E402
from stress.on_manager import run_on_manager  # noqa: E402
from stress.presets import PRESETS  # noqa: E402
from stress.real_cache import reduced  # noqa: E402
from stress.run import Run  # noqa: E402
from stress.scenario import Scenario  # noqa: E402
from stress.simulator import simulate  # noqa: E402

from qvg_paged import ArgumentError, CacheConfig, KVCacheManager, QualityFloor, Rung  # noqa: E402
from qvg_paged.ladder import Relief, Squeeze  # noqa: E402
from qvg_paged.scheduler import LadderBackend, TieredCache  # noqa: E402


def moves(run: Run) -> Counter[str]:
    """How many streams were demoted, shrunk and parked."""
    found: Counter[str] = Counter()
    for record in map(json.loads, run.lines):
        if record["kind"] == "plan":
            found.update({name: len(record[name]) for name in ("demoted", "shrunk", "parked")})
    return found


@pytest.fixture(scope="module")
def run() -> Run:
    return simulate(PRESETS["retrieval"], 0)


@pytest.mark.parametrize("ladder", LADDERS)
def test_the_simulated_ladder_reckons_as_the_real_cache_does(ladder: str) -> None:
    geometry = reduced(MODELS["self-forcing"])
    window = replace(geometry.window, retrieval_frames=24)
    kept, cheapest = LADDERS[ladder]
    config = CacheConfig(memory="64MiB", format=kept, demote_to=cheapest, span_frames=geometry.span_frames)
    real = TieredCache(KVCacheManager(geometry.model, config))
    books = LadderCache(geometry, real.pool_nbytes, 0, Costs(), ladder)
    assert isinstance(books, LadderBackend)
    assert books.demand(window, 100) == real.demand(window, 100)
    squeezes = [Squeeze(), Squeeze(Rung.TAIL, 30), Squeeze(Rung.TAIL, 31, 12)]
    if ladder == "spans":
        squeezes.append(Squeeze(Rung.SPANS, 7))
    for now in squeezes:
        for committed in (30, 31, 60, 97):
            need = real.squeezed_demand(window, committed, 3, now)
            assert books.squeezed_demand(window, committed, 3, now) == need
            assert books.demand_nbytes(need) == real.demand_nbytes(need)
            for count in (1, 4, 5, 6, 20):
                assert books.can_host([need] * count) == real.can_host([need] * count)
        for relief in Relief:
            for floor in (QualityFloor(), QualityFloor(rung=Rung.NONE, retrieval_frames=6)):
                ours = books.lowered(window, 100, floor, now, 60, relief)
                assert ours == real.lowered(window, 100, floor, now, 60, relief)


def test_streams_are_stored_more_cheaply_before_many_are_parked_and_more_viewers_never_wait(run: Run) -> None:
    without = simulate(replace(PRESETS["retrieval"], ladder=""), 0)
    found = moves(run)
    assert found["demoted"] > 20
    assert found["shrunk"] > 20
    assert found["parked"] < 0.5 * moves(without)["parked"]
    ours, theirs = measure(run.lines).summary(), measure(without.lines).summary()
    assert ours["continuous_play_ratio"] > theirs["continuous_play_ratio"]
    assert ours["chunks_per_second_under_load"] > 0.99 * theirs["chunks_per_second_under_load"]


def test_squeezing_takes_time() -> None:
    slow = replace(PRESETS["ladder"], costs=Costs(encode_rate=1e8))
    assert simulate(slow, 0).seconds > simulate(PRESETS["ladder"], 0).seconds + 60
    assert Costs(encode_rate=2e9).squeeze(10**9) == 0.5


def broken(run: Run, kind: str, changes: dict[str, Any]) -> list[str]:
    """The log with the first plan that has a demotion (or the submission of its stream) changed."""
    log = [json.loads(line) for line in run.lines]
    plan = next(record for record in log if record["kind"] == "plan" and record[kind])
    name = plan[kind][0][0]
    place = plan["seq"]
    if "quality" in changes:
        place = next(r["seq"] for r in log if r["kind"] == "submit" and r["id"] == name)
    lines = list(run.lines)
    record = log[place]
    lines[place] = json.dumps({**record, **{key: change(record) for key, change in changes.items()}})
    return lines


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("demoted", {"demoted": lambda r: [[r["demoted"][0][0], 0, 0]]}),
        ("demoted", {"demoted": lambda r: [*r["demoted"], r["demoted"][0]]}),
        ("demoted", {"demoted": lambda r: [[r["demoted"][0][0], 1, 10_000]]}),
        ("demoted", {"quality": lambda _: {"rung": 0, "retrieval_frames": 0}}),
        ("demoted", {"demoted": lambda _: [["s1", 1, 0]]}),
        ("shrunk", {"shrunk": lambda r: [[r["shrunk"][0][0], 24]]}),
        ("shrunk", {"quality": lambda _: {"rung": 2, "retrieval_frames": 20}}),
    ],
)
def test_the_checker_sees_a_stream_that_goes_up_or_below_its_floor_or_does_not_run(
    run: Run, kind: str, changes: dict[str, Any]
) -> None:
    assert check_log(run.lines) == []
    assert "ladder" in {violation.invariant for violation in check_log(broken(run, kind, changes))}


def test_the_real_cache_is_squeezed_and_holds_what_the_books_say() -> None:
    found: Counter[str] = Counter()
    for name, seed in (("ladder", 0), ("retrieval", 1)):
        faults = {"chunk fails": 0.05, "nan": 0.03, "park fails": 0.1, "bit flipped": 0.1, "pool shrinks": 0.05}
        scenario = replace(PRESETS[name], streams=12, load=4.0, pool_streams=1.6, faults=faults if seed else {})
        done = run_on_manager(scenario, seed, "cpu")
        assert done.drained
        assert measure(done.lines).violations == []
        found.update(moves(done))
    assert min(found["demoted"], found["shrunk"], found["parked"]) > 0


def test_the_world_model_generates_under_the_harness_whatever_goes_wrong() -> None:
    scenario = Scenario(
        model="world-model", policy="evicts-the-leader", streams=4, frames=(6, 10), pool_streams=1.0, load=6.0,
        ladder="tails", faults={"chunk fails": 0.5, "nan": 0.1, "park fails": 0.3, "bit flipped": 0.3},
        config=replace(Scenario().config, policy_strikes=1000),
    )  # fmt: skip
    done = run_on_manager(scenario, 0, "cpu")
    assert done.drained
    assert measure(done.lines).violations == []
    assert done.fired


def bench_file(folder: Path, **changes: Any) -> Path:
    """A result file with the two rows that costs are taken from."""
    loop = {
        "name": "chunk loop of 30 layers", "systems": {"auto": {"timing": {"median_ms": 400.0}}},
        "shape": {"layers": 30, "heads": 12, "head_dim": 128, "ffn": 8960, "tokens": 1560, "chunk": 3, "history": 49},
    }  # fmt: skip
    encode = {
        "name": "K and V of a span [12, 37,440, 128]", "shape": {"heads": 12, "tokens": 37_440, "head_dim": 128},
        "systems": {"qvg4-int2": {"timing": {"median_ms": 2.0}}},
    }  # fmt: skip
    content = {"commit": "abc", "device": {"name": "GPU"}, "results": {"rows": [loop, encode]}, **changes}
    path = folder / "bench.json"
    path.write_text(json.dumps(content))
    return path


def test_costs_are_what_a_gpu_measured_by_the_work_of_the_geometry(tmp_path: Path) -> None:
    path = bench_file(tmp_path)
    costs = measured_costs(path, "self-forcing")
    rate = 2 * 2 * 12 * 37_440 * 128 / 2e-3
    assert costs.encode_rate == pytest.approx(rate)
    frames = 3 * MODELS["self-forcing"].model.frame_nbytes
    assert costs.chunk == pytest.approx(0.4 + frames / rate), "the loop's own geometry with a full window"
    assert costs.chunk_more == costs.chunk
    assert costs.source == "bench.json of GPU, commit abc; transfers in round figures"
    assert measured_costs(path, "lingbot-v2").chunk > 20 * costs.chunk
    park = {"results": {"rows": [{"format": "qvg4-int2", "park_gb_s": 50.0, "resume_gb_s": 45.0}]}}
    (tmp_path / "park_bench.json").write_text(json.dumps(park))
    again = measured_costs(path, "self-forcing")
    assert again.transfer_rate == 45e9
    assert again.source == "bench.json of GPU, commit abc, and park_bench.json"
    options = StressOptions(costs=path, chunk_more_seconds=0.25)
    assert make_scenario(options, 0).costs == replace(again, chunk_more=0.25)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {"rows": [{"name": "chunk loop", "systems": {}}]}}'])
def test_a_file_that_has_not_measured_it_is_no_source_of_costs(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match="costs: expected"):
        measured_costs(path, "self-forcing")
    with pytest.raises(ArgumentError, match="costs: expected"):
        measured_costs(tmp_path / "none.json", "self-forcing")
    slow = bench_file(tmp_path)
    content = json.loads(slow.read_text())
    content["results"]["rows"][0]["systems"] = {"auto": {"timing": None}}
    slow.write_text(json.dumps(content))
    with pytest.raises(ArgumentError, match="expected a time of 'auto'"):
        measured_costs(slow, "self-forcing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [*(({"frames": text}, "frames") for text in ("9-3", "x", "0-3", "")), ({"ladder": "up"}, "ladder")],
)
def test_options_of_lengths_and_ladders_are_checked(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_scenario(StressOptions(**changes), 0)  # type: ignore[arg-type]
    assert make_scenario(StressOptions(frames="6-9"), 0).frames == (6, 9)
    assert make_scenario(StressOptions(frames="6"), 0).frames == (6, 6)
    assert make_scenario(StressOptions(scenario="ladder", ladder="none"), 0).ladder == ""
    assert make_scenario(StressOptions(ladder="spans"), 0).ladder == "spans"
