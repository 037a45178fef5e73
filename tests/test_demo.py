"""The demo: streams are generated the same in any company, waiting and refusal are told, its files stand alone."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

import demo  # noqa: E402
import demo_results  # noqa: E402
import readme_tables  # noqa: E402
import results_file  # noqa: E402
from PIL import Image  # noqa: E402
from world_model.evaluate import psnr  # noqa: E402
from world_model.model import WorldModel, WorldModelConfig  # noqa: E402
from world_streams import HistoryRead, Shot, WorldEngine, fit_memory, generate, model_spec, return_shots  # noqa: E402

from qvg_paged import (  # noqa: E402
    ArgumentError,
    CacheConfig,
    KVCacheManager,
    NonFiniteError,
    Window,
    estimate,
    inject_fault,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = WorldModelConfig(resolution=32, dim=256, layers=3)
FRAMES = 12


class Silent:
    """Progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int, str]] = []

    def phase(self, title: str, streams: Sequence[str], frames: int) -> None:
        assert title
        assert streams
        assert frames == FRAMES

    def stream(self, name: str, frames: int, note: str) -> None:
        self.notes.append((name, frames, note))


@pytest.fixture(scope="module")
def model() -> WorldModel:
    """A small model with every parameter, gates and gains included, away from its initial value."""
    model = WorldModel(TINY).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def run_demo(model: WorldModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the demo with the small model and returns its result and its progress."""
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    monkeypatch.setattr(demo, "load_model", lambda _path, _device: model)

    def run(**changes: Any) -> tuple[dict[str, Any], Silent]:
        fields = {"streams": 2, "given": 6, "generated": 6, "steps": 1, "device": "cpu", "out": tmp_path / "out"}
        progress = Silent()
        return demo.run(demo.DemoOptions(weights=weights, **{**fields, **changes}), progress), progress

    return run


def shots(count: int = 2) -> list[Shot]:
    return return_shots(count, given=4, generated=4, resolution=TINY.resolution)


def cache_for(count: int, **changes: Any) -> KVCacheManager:
    config = CacheConfig(**{"memory": "1GiB", "format": "dense", "span_frames": 2, **changes})
    spec = model_spec(TINY, dtype=torch.float32)
    return KVCacheManager(spec, fit_memory(spec, config, Window(recent_frames=8), frames=8, streams=count))


def checks(content: dict[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["held"] for check in content["results"]["checks"]}


def test_noise_is_named_by_seed_stream_and_frame_alone() -> None:
    first, second = shots()
    again = shots(1)[0]
    torch.testing.assert_close(first.noise(5), again.noise(5), rtol=0, atol=0)
    others = [first.noise(6), second.noise(5), Shot(**{**vars(first), "seed": 1}).noise(5)]
    assert all((first.noise(5) - other).abs().mean() > 0.5 for other in others)


def test_a_stream_shows_the_same_alone_and_in_company_at_another_frame(model: WorldModel) -> None:
    first, second = shots()
    alone = generate(model, cache_for(1), [second], steps=2)[0]
    engine = WorldEngine(model, cache_for(2), steps=2)
    streams = [engine.open(first), engine.open(second)]
    engine.advance(streams[:1])  # the first is a frame ahead from here on
    while not streams[1].done:
        engine.advance([stream for stream in streams if not stream.done])
    company, lonely = torch.stack(streams[1].video), torch.stack(alone.video)
    torch.testing.assert_close(company[:4], second.truth[:4], rtol=0, atol=0)
    torch.testing.assert_close(company, lonely, rtol=0, atol=2e-4)


def test_a_chunk_that_fails_leaves_every_stream_where_it_was(model: WorldModel) -> None:
    engine = WorldEngine(model, cache_for(2), steps=1)
    streams = [engine.open(shot) for shot in shots()]
    engine.advance(streams)
    with inject_fault("commit.check", NonFiniteError("broken")), pytest.raises(NonFiniteError):
        engine.advance(streams)
    assert [stream.frame for stream in streams] == [1, 1]
    assert all(len(stream.video) == 1 for stream in streams)
    engine.advance(streams)
    engine.cache.check_integrity()


def test_a_commit_that_fails_halfway_leaves_frames_and_videos_in_step(model: WorldModel) -> None:
    engine = WorldEngine(model, cache_for(2, format="qvg4-int2"), steps=1)
    streams = [engine.open(shot) for shot in shots()]
    engine.advance(streams)
    layers = TINY.layers  # the first stream's span is encoded, the second one's fails
    with inject_fault("encode.layer", NonFiniteError("broken"), skip=layers), pytest.raises(NonFiniteError):
        engine.advance(streams)
    assert [len(stream.video) for stream in streams] == [stream.frame for stream in streams] == [2, 1]
    engine.advance(streams)
    assert [stream.frame for stream in streams] == [3, 2]
    engine.cache.check_integrity()


def test_the_share_of_history_read_quantised_counts_closed_spans(model: WorldModel) -> None:
    engine = WorldEngine(model, cache_for(1, format="qvg4-int2"), steps=1)
    stream = engine.open(shots(1)[0])
    seen = []
    for _ in range(6):
        engine.advance([stream])
        seen.append(stream.last_read)
    tokens = TINY.tokens_per_frame
    assert seen == [HistoryRead(f * tokens, f // 2 * 2 * tokens) for f in range(6)]


def test_fitted_memory_is_the_least_that_holds_the_streams() -> None:
    spec, window = model_spec(WorldModelConfig()), Window(recent_frames=48)
    config = fit_memory(spec, CacheConfig(memory="1GiB", span_frames=8), window, frames=48, streams=4)
    assert isinstance(config.memory, int)
    assert estimate(spec, config, window, 48).streams == 4
    less = CacheConfig(memory=config.memory - (64 << 10), span_frames=8)
    assert estimate(spec, less, window, 48).streams < 4
    assert config.memory < 2 * 48 * spec.frame_nbytes


def test_the_demo_finishes_inside_its_budget_and_writes_files_that_stand_alone(run_demo: Any, tmp_path: Path) -> None:
    content, progress = run_demo()
    held = checks(content)
    assert held["every stream finished"]
    assert held["all resident at once"]
    assert held["peak inside the budget"]
    assert held["history read in 2 bits"]
    assert {note[:2] for note in progress.notes} >= {("shot-1", FRAMES), ("shot-2", FRAMES)}
    for row in content["results"]["rows"]:
        assert row["waits"] == 0
        assert row["ratio"] == pytest.approx(row["dense_nbytes"] / row["nbytes"])
        assert len(row["psnr_curve"]) == 6

    out = tmp_path / "out"
    assert json.loads((out / "result.json").read_text())["schema"] == results_file.SCHEMA
    page = (out / "report.html").read_text()
    assert set(re.findall(r'src="(\w+:[^;]*)', page)) == {"data:image/gif", "data:image/png", "data:image/svg+xml"}
    assert not re.findall(r"https?://", page)
    assert Image.open(out / "contact_sheet.png").width > 6 * TINY.resolution
    assert Image.open(out / "shot-2.gif").n_frames == FRAMES  # type: ignore[attr-defined]


def test_unquantised_pages_change_nothing_and_do_not_count_as_2_bit(run_demo: Any) -> None:
    content, _ = run_demo(format="dense")
    assert all(row["psnr"] > 60 for row in content["results"]["rows"])
    assert not checks(content)["history read in 2 bits"]
    assert not checks(content)["too little memory without quantisation"]


def test_streams_that_do_not_fit_together_wait_for_each_other(run_demo: Any) -> None:
    spec, window = model_spec(TINY), Window(recent_frames=FRAMES)
    one = fit_memory(spec, CacheConfig(memory="1GiB", span_frames=2), window, frames=FRAMES, streams=1)
    content, progress = run_demo(memory=str(one.memory), streams=3)
    rows = content["results"]["rows"]
    together = content["results"]["summary"]["resident"]
    assert checks(content)["every stream finished"]
    assert together < 3
    assert not checks(content)["all resident at once"]
    assert rows[0]["waits"] == 0
    assert rows[2]["waits"] >= FRAMES
    assert ("shot-3", 0, "no memory") in progress.notes or ("shot-3", 0, "behind") in progress.notes


def test_a_stream_that_can_never_fit_is_refused_and_reported(run_demo: Any, tmp_path: Path) -> None:
    spec = model_spec(TINY)
    short = fit_memory(spec, CacheConfig(memory="1GiB", format="dense"), Window(recent_frames=3), frames=3, streams=1)
    content, _ = run_demo(memory=str(short.memory), format="dense")
    assert all("refused" in row["decision"] for row in content["results"]["rows"])
    assert not checks(content)["every stream finished"]
    assert "refused" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"format": "int3"}, "format: expected one of dense, qvg-int2"),
        ({"device": "tpu"}, "device: expected cpu or cuda"),
        ({"weights": Path("no/such/file")}, "weights: expected a safetensors file, got no/such/file"),
    ],
)
def test_options_that_cannot_work_say_what_would(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        demo.DemoOptions(**{"weights": Path(__file__), **changes})


def test_readme_tables_come_from_result_files_only(run_demo: Any, tmp_path: Path) -> None:
    text = "before\n<!-- table: demo -->\nstale words\n<!-- end -->\nafter\n"
    results = tmp_path / "benchmarks" / "results"
    assert "No result recorded yet" in readme_tables.fill(text, results)
    content, _ = run_demo()
    results_file.write(results / "somewhere" / "demo.json", content)
    filled = readme_tables.fill(text, results)
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "stale words" not in filled
    assert f"| {content['results']['rows'][1]['psnr']:.2f} |" in filled
    assert "(benchmarks/results/somewhere/demo.json)" in filled
    assert readme_tables.fill(filled, results) == filled
    with pytest.raises(ValueError, match="demo, eval, same-bytes"):
        readme_tables.fill("<!-- table: speed -->\n<!-- end -->", results)


def test_result_files_name_no_folder_of_the_machine_they_were_made_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/qvg_paged/__main__.py", "demo", "--out", "/somewhere/runs/x"])
    inside = results_file.ROOT / "benchmarks" / "world_model"
    content = results_file.result(device="cpu", config={"out": Path("/somewhere/x"), "model": inside}, results=[])
    assert content["command"] == "qvg-paged demo --out x"
    assert content["config"] == {"out": "x", "model": "benchmarks/world_model"}


def test_psnr_between_a_run_and_itself_is_not_infinite() -> None:
    frames = torch.rand(2, 3, 8, 8)
    assert psnr(frames, frames).clamp_max(demo_results.MAX_PSNR).isfinite().all()
