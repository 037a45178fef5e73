"""The closed loop of many codecs: what it runs is what the library stores, and its scores mean what they say."""

import json
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from evaluation import EvalOptions, same_bytes_window
from quality import paged
from quality.candidates import Candidate
from quality.codecs import Library, RoundToNearest, hadamard
from quality.frontier import FrontierOptions, run
from quality.loop import Cache, CodedHistory, generate
from quality.metrics import gmsd, paired_interval
from quality.outliers import contrast_of, with_contrast
from quality.paths import KINDS, revisit_paths
from quality.record import plan
from quality.report import compare, table
from quality.row import REAL_GEOMETRIES
from quality.rows import SAME_BYTES_WINDOW, rows_named
from quality.rungs import ROWS
from quality.rungs import run as run_rungs
from quality.synthetic import STATISTICS, synthesise
from quality.synthetic_error import errors
from world_model.model import WorldModel, WorldModelConfig, load_model
from world_model.weights import export
from world_streams import generate as generate_paged
from world_streams import model_spec, return_shots

from qvg_paged import FORMATS, QVG, BalanceRule, CacheConfig, Grid, KVCacheManager
from qvg_paged.cli import app
from qvg_paged.kernels.formats import Codec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> WorldModel:
    """A small model whose output depends on its cache."""
    torch.manual_seed(0)
    small = WorldModel(WorldModelConfig(dim=128, layers=2))
    for block in small.blocks:
        torch.nn.init.normal_(block.o.weight, std=0.1)
    torch.nn.init.normal_(small.out.weight, std=0.05)
    return small.eval()


def spanlike(heads: int = 3, tokens: int = 512) -> torch.Tensor:
    x = torch.randn(heads, tokens, 128) * torch.logspace(-1, 1, 128) + torch.randn(9, 1, 128)[torch.arange(heads)]
    return x.bfloat16()


@pytest.mark.parametrize(
    ("codec", "candidate"),
    [
        (replace(QVG, num_centroids=8), Candidate(levels="ternary", rule="absmax")),
        (
            replace(FORMATS["best-2bit"].key, num_centroids=21),
            Candidate(balance="cap", residual="pair", block=128, centroids=21, centroid_bits=8),
        ),
        (
            replace(FORMATS["best-2bit"].key, num_centroids=21, balance_rule=BalanceRule.ROOT),
            Candidate(balance="knee4", block=128, centroids=21, centroid_bits=8),
        ),
        (
            replace(FORMATS["near-lossless"].value, num_centroids=5, balanced=False),
            Candidate(levels="int4", block=128, centroids=5, centroid_bits=8),
        ),
    ],
)
def test_a_candidate_with_the_switches_of_a_codec_of_the_library_reads_the_same_and_costs_the_same(
    codec: Codec, candidate: Candidate
) -> None:
    x = spanlike()
    ours = Library(codec)
    assert candidate.bits(512, 128) == pytest.approx(
        ours.bits(512, 128), abs=0.08 if codec.centroid_type.value == "fp8" else 0
    )
    mine, theirs = ours.code(x, None).float(), candidate.code(x, None)
    error = [(y - x.float()).square().sum().sqrt().item() for y in (mine, theirs)]
    assert error[1] == pytest.approx(error[0], rel=0.02)


def test_the_closed_loop_of_the_library_s_codec_is_that_of_the_pages(model: WorldModel) -> None:
    """The same video, up to rounding; without centroids, whose seeds depend on the number of heads in a call."""
    paths = revisit_paths(1, given=8)
    fmt = FORMATS["best-2bit"].with_codecs(stages=0)
    cache = Cache(key=Library(fmt.key), value=Library(fmt.value, key=False))
    dense, coded = (CodedHistory(model, [c], 1, 16, 4) for c in (Cache(), cache))
    exact, ours = (generate(model, paths, history, steps=1)[0] for history in (dense, coded))
    shot = replace(return_shots(1, given=8, generated=8)[0], truth=paths.frames[0], poses=paths.poses[0])
    noise = [paths.noise(frame)[0] for frame in range(16)]
    object.__setattr__(shot, "noise", lambda frame: noise[frame])
    spec = model_spec(model.config, dtype=torch.float32)
    config = CacheConfig(memory="64MiB", format=fmt, span_frames=4)
    paged = torch.stack(generate_paged(model, KVCacheManager(spec, config), [shot], steps=1)[0].video[8:])
    lost = (ours[0] - exact[0]).square().mean()
    assert 0 < lost < 1e-2
    assert (paged - ours[0]).square().mean() <= 1e-3 * lost


@pytest.mark.parametrize("name", ["best-2bit", "balanced", "near-lossless"])
@pytest.mark.parametrize("model_name", REAL_GEOMETRIES)
def test_a_preset_keeps_to_its_bits_here_and_at_real_geometries(name: str, model_name: str) -> None:
    limit = {"best-2bit": 2.35, "balanced": 3.3, "near-lossless": 4.4}[name]
    row = rows_named([name])[0]
    assert row.bits(1024, 128, 64) <= limit
    assert row.real_bits(model_name, 1024) <= limit
    tokens, dim = REAL_GEOMETRIES[model_name]
    whole = sum(Library(codec).bits(tokens, dim) for codec in (FORMATS[name].key, FORMATS[name].value)) / 2
    assert whole <= limit


def test_paths_show_again_what_was_given() -> None:
    paths = revisit_paths(6, given=8, resolution=16)
    assert paths.kind == [*KINDS, *KINDS]
    for path, source in enumerate(paths.source):
        assert torch.equal(source[:8], torch.arange(8))
        assert bool((source < 8).all())
        seen = paths.frames[path, source]
        turn = (paths.poses[path, :, 2] - paths.poses[path, source, 2]) / (2 * torch.pi)
        assert (turn - turn.round()).abs().max() < 1e-5
        assert (seen - paths.frames[path]).abs().mean() < 0.02


def test_the_window_of_the_same_bytes_is_that_of_the_shipped_model() -> None:
    config = CacheConfig(memory="1GiB", format="best-2bit", span_frames=16)
    assert same_bytes_window(model_spec(WorldModelConfig()), config, 64)[1] == SAME_BYTES_WINDOW


def test_outliers_have_the_contrast_asked_for_and_change_no_picture(model: WorldModel) -> None:
    paths = revisit_paths(3, given=4)
    other = WorldModel(model.config).eval()
    other.load_state_dict(with_contrast(model, paths, 40.0))
    videos, contrasts = [], []
    for some in (model, other):
        history = CodedHistory(some, [Cache()], 3, 8, 4, keep=True)
        videos.append(generate(some, paths, history, steps=1))
        medians = history.keys[:, :, : 4 * 64].abs().permute(0, 3, 4, 1, 2).flatten(3).median(-1).values
        contrasts.append(contrast_of(medians).item())
    assert contrasts[0] < 20 < contrasts[1]
    assert contrasts[1] == pytest.approx(40, rel=0.02)
    assert (videos[0] - videos[1]).abs().max() < 1e-3


def test_hadamard_is_its_own_inverse_and_spreads_an_outlier() -> None:
    x = torch.zeros(1, 2, 64)
    x[0, 0, 5] = 8.0
    assert torch.allclose(hadamard(x)[0, 0].abs(), torch.ones(64))
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-6)


def test_channels_with_scales_of_their_own_survive_outliers() -> None:
    x = torch.randn(1, 128, 64)
    x[:, :, 3] *= 100
    quiet = torch.arange(64) != 3
    error = {
        name: (codec.code(x, None) - x)[..., quiet].square().mean()
        for name, codec in (("kivi", RoundToNearest(block=32, per_channel=True)), ("rtn", RoundToNearest(block=32)))
    }
    assert error["kivi"] < 0.3 * error["rtn"]


@dataclass(frozen=True)
class NoisyKeys(Library):
    """Keys with an error of known size in some channels."""

    def code(self, x: torch.Tensor, *_: object) -> torch.Tensor:  # type: ignore[override]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        return x + noise * torch.linspace(0, 2, 128)


def test_corrected_logits_give_noisy_keys_the_attention_that_exact_ones_have(model: WorldModel) -> None:
    q, k = torch.randn(1, 64, 1, 128), [torch.randn(1, 64, 1, 128) for _ in range(5)]

    def mass(cache: Cache) -> float:
        history = CodedHistory(model, [cache], 1, 6, 4)
        for frame in range(5):
            history.clean = True
            for layer in range(history.layers):
                out = history.attend(layer, q, k[frame], torch.full_like(q, float(frame < 4)))
            if frame < 4:
                history.commit()
        return out.mean().item()

    noisy = NoisyKeys(QVG)
    exact, plain = mass(Cache()), mass(Cache(key=noisy))
    assert plain > exact + 0.03
    for corrected in (Cache(key=noisy, correction=1.0), Cache(key=noisy, correction=1.0, correction_pairs=24)):
        assert abs(mass(corrected) - exact) < 0.4 * (plain - exact)


def test_a_warm_start_goes_on_from_the_centroids_of_the_span_before() -> None:
    x, memory = spanlike(), dict[str, torch.Tensor]()
    cold = Candidate(centroids=16, iterations=0)
    warm = replace(cold, warm=True)
    first, second = warm.code(x, None, memory), warm.code(x, None, memory)
    lost = [(found - x.float()).square().mean().item() for found in (first, second, cold.code(x))]
    assert lost[0] < 0.95 * lost[2]
    assert lost[1] == pytest.approx(lost[0], rel=0.02)


def test_components_read_better_than_centroids_what_lies_near_a_plane() -> None:
    plane = torch.randn(2, 512, 6) @ torch.randn(2, 6, 128)
    x = plane + 0.3 * torch.randn(2, 512, 128)
    base = Candidate(residual="channel", block=128, centroid_bits=8)
    centroids, components = replace(base, centroids=8), replace(base, centroids=0, rank=8)
    lost = [(codec.code(x) - x).square().mean().item() for codec in (centroids, components)]
    assert lost[1] < 0.5 * lost[0]
    assert components.bits(37440, 128) == pytest.approx(2 + 8 / 128 + (16 + 8) / 128 + (9 * 8 + 16) / 37440)


def test_rounding_by_the_output_projection_costs_values_and_spares_what_follows(model: WorldModel) -> None:
    weight = model.blocks[1].o.weight[:, :128]  # type: ignore[union-attr,index]
    metric = CodedHistory(model, [Cache()], 1, 8, 4, keep=True).outputs()
    assert metric is not None
    assert torch.allclose(metric[1], weight.T @ weight, atol=1e-4)
    few = torch.randn(1, 128, 8)
    metric, values = few @ few.transpose(1, 2), torch.randn(1, 256, 128)
    plain = Candidate(residual="channel", block=128, centroid_bits=8)
    errors = [codec.code(values, metric) - values for codec in (plain, replace(plain, feedback=4.0))]
    lost = [error.square().mean().item() for error in errors]
    seen = [((error @ metric) * error).mean().item() for error in errors]
    assert lost[1] > lost[0]
    assert seen[1] < 0.5 * seen[0]


def test_integer_centroids_cost_what_fp8_ones_cost_and_read_as_well() -> None:
    x = spanlike()
    fp8, integers = (Candidate(centroids=8, centroid_bits=8, centroid_integers=whole) for whole in (False, True))
    assert integers.bits(512, 128) == fp8.bits(512, 128)
    lost = [(codec.code(x) - x.float()).square().mean().item() for codec in (fp8, integers)]
    assert lost[1] == pytest.approx(lost[0], rel=0.05)
    assert lost[1] != lost[0]


def test_rows_on_the_first_paths_see_what_they_see_among_all(model: WorldModel, tmp_path: Path) -> None:
    paths = revisit_paths(6, given=4)
    few = paths.first(3)
    assert len(few) == 3
    assert torch.equal(paths.noise(5)[:3], few.noise(5))
    weights = tmp_path / "tiny.safetensors"
    export(model.state_dict(), weights, {})
    base = FrontierOptions(weights=(weights,), paths=4, given=6, steps=1, span_frames=3, rows=("rerun",))
    whole, some = (run(options, lambda _: None)["tiny"]["plain"][0] for options in (base, replace(base, first=2)))
    assert some["paths"] == 2
    assert some["truth"]["paths"] == pytest.approx(whole["truth"]["paths"][:2], abs=0.01)
    assert some["dense"]["mean"] > 60


def test_scores_of_paths_shared_out_among_processes_are_put_together(
    model: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "tiny.safetensors"
    export(model.state_dict(), weights, {})
    monkeypatch.setattr(paged, "SPAN_FRAMES", 3)
    options = EvalOptions(weights=weights, worlds=2, given=6, steps=1, span_frames=3, memory="64MiB")
    shards = [paged.shard(replace(options, world_seed=seed)) for seed in (7, 8)]
    found = paged.pooled(shards)
    fp8, bf16, window = found["pairs"][0]["ours"], found["pairs"][0]["theirs"], found["pairs"][2]["theirs"]
    assert len(found["rows"][fp8]["dense"]["paths"]) == 4
    assert found["rows"]["unquantised"]["dense"]["mean"] > found["rows"][bf16]["dense"]["mean"] > 20
    assert "window" in window
    assert found["pairs"][0]["low"] <= found["pairs"][0]["mean"] <= found["pairs"][0]["high"]


def test_what_matters_most_is_recorded_first_and_on_all_paths() -> None:
    first = FrontierOptions(weights=(Path("a"),), paths=96)
    steps = plan(first, Path("b"))
    assert [step.weights[0].name for step in steps[:4]] == ["a", "b", "a", "b"]
    assert "presets" in steps[0].rows
    assert all(step.first == 48 for step in steps if step.rows == ("candidates",))


def test_streams_squeezed_while_they_generate_are_compared_from_then_on(model: WorldModel, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    export(model.state_dict(), weights, {})
    arguments = Namespace(
        weights=weights, device="cpu", worlds=2, given=10, steps=1, span_frames=5, memory="64MiB"
    )  # fmt: skip
    *_, rows = run_rungs(arguments, [row for row in ROWS if "near" not in row.name])
    found = {row["name"]: row for row in rows}
    tail, coarse = found["qvg-int4, dense tail"], found["qvg-int4, 2 bits from the turn on"]
    assert found["unquantised"]["dense"]["mean"] > 80
    assert tail["dense"]["mean"] > coarse["dense"]["mean"] + 3
    assert coarse["bits"] < tail["bits"] - 1.5
    assert coarse["freed_nbytes"] > 0
    assert found["qvg-int4, 2 bits from half of the way back on"]["from_frame"] == 5
    assert found["best-2bit, 8 left to retrieve from"]["frames"] == 16


@pytest.mark.parametrize("one", STATISTICS, ids=lambda one: f"{one.model} {one.tensor}")
def test_synthetic_tensors_have_the_statistics_they_are_told(one: Any) -> None:
    x = synthesise(replace(one, frames=2), heads=2)
    assert x.shape == (2, 3120, 128)
    assert x.square().mean().sqrt().item() == pytest.approx(one.rms, rel=0.01)
    mean = x.mean(1, keepdim=True)
    assert (mean.square().mean() / x.square().mean()).item() == pytest.approx(one.mean_share, abs=0.01)
    values = torch.linalg.svdvals(x - mean).square()
    energy = (values.cumsum(-1) / values.sum(-1, keepdim=True)).mean(0)
    for rank, reached in zip((1, 4, 8, 16, 32, 64), one.energy, strict=True):
        assert energy[rank - 1].item() == pytest.approx(reached, abs=0.12)
    loud = x.abs().median(1).values
    if one.walls:
        assert set(loud.mean(0).topk(len(one.walls)).indices.tolist()) == {channel for channel, _ in one.walls}


def test_errors_of_a_format_count_its_spans_and_its_quiet_channels() -> None:
    x = synthesise(replace(STATISTICS[0], frames=1), heads=2).bfloat16()
    codec = FORMATS["best-2bit"].key
    whole, cut = errors(x, codec, key=True), errors(x, codec, key=True, span=520)
    assert whole["error"] < whole["around_mean"] < whole["quiet"] < 1
    assert cut["bits"] > 2.2
    assert errors(x, replace(codec, grid=Grid.INT4), key=True)["error"] < 0.4 * whole["error"]


def test_gmsd_is_zero_for_equal_frames_and_grows_with_noise() -> None:
    frames = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    noise = torch.randn_like(frames)
    scores = [gmsd(frames + level * noise, frames) for level in (0.0, 0.05, 0.3)]
    assert scores[0].shape == (2, 3)
    assert scores[0].abs().max() < 1e-6
    assert bool((scores[1] < scores[2]).all())


def test_a_paired_interval_covers_a_constant_difference_exactly_and_noise_widely() -> None:
    base = torch.randn(96) * 5
    assert paired_interval(base + 2, base) == pytest.approx((2, 2, 2), abs=1e-5)
    mean, low, high = paired_interval(base + torch.randn(96), base)
    assert low < mean < high
    assert 0.2 < high - low < 0.8


def test_a_frontier_runs_in_processes_and_reads_as_a_table(model: WorldModel, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    export(model.state_dict(), weights, {})
    assert load_model(weights).config == model.config
    names = ("best-2bit", "QVG int2 Kc=8")
    options = FrontierOptions(
        weights=(weights,), paths=3, given=6, steps=1, span_frames=3, rows=names, rows_at_once=1, jobs=1
    )
    rows = run(options, lambda _: None)["tiny"]["plain"]
    assert [row["name"] for row in rows] == ["best-2bit", "QVG int2 Kc=8"]
    assert compare(rows[0], rows[1])[0] > 0
    assert rows[0]["attention"]["top_key_changes"] < rows[1]["attention"]["top_key_changes"]
    assert len(table(rows)) == 4


def test_an_unknown_row_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"rows: expected one of presets, .*got 'best-1bit'"):
        rows_named(["best-1bit"])


def test_the_command_line_writes_results_tables_and_a_plot(model: WorldModel, tmp_path: Path) -> None:
    weights = tmp_path / "tiny.safetensors"
    export(model.state_dict(), weights, {})
    words = ["eval", "--frontier", "--weights", str(weights), "--device", "cpu", "--worlds", "3", "--given", "6"]
    words += ["--steps", "1", "--span-frames", "3", "--variant", "plain", "--variant", "13x"]
    words += ["--only", "best-2bit", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "| best-2bit |" in done.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())["results"]["tiny"]
    assert [row["name"] for row in found["plain"]] == ["best-2bit"]
    assert {"QVG int2 Kc=8", "best-2bit"} <= {row["name"] for row in found["13x"]}
    assert all("loss_against_truth" in row for rows in found.values() for row in rows)
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
