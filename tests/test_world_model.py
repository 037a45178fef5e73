"""The benchmark model: its renderer shows rooms, its cache changes nothing, and its trainer runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))

from world_model import train  # noqa: E402
from world_model.evaluate import copy_last_frame, psnr, return_paths, ssim  # noqa: E402
from world_model.model import ROPE_PAIRS, WorldModel, WorldModelConfig  # noqa: E402
from world_model.muon import orthogonalize  # noqa: E402
from world_model.objective import causal_mask, predict_after_history, run_block, training_mask  # noqa: E402
from world_model.outliers import with_key_outliers  # noqa: E402
from world_model.sampling import DenseCache, generate  # noqa: E402
from world_model.weights import join_parts, split_parts  # noqa: E402
from world_model.world import RETURN_PATHS, RoomVideos, camera_paths, make_worlds, render  # noqa: E402

TINY = WorldModelConfig(resolution=32, dim=256, layers=3)


@pytest.fixture
def model() -> WorldModel:
    """A small model with every parameter, gates and gains included, away from its initial value."""
    model = WorldModel(TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_clip(frames: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, frames, 3, 32, 32) * 2 - 1, torch.randn(batch, frames, 3)


@torch.no_grad()
def test_frames_through_a_cache_equal_the_whole_clip_at_once(model: WorldModel) -> None:
    video, pose = random_clip(5)
    levels = torch.rand(2, 5)
    x, modulation = model.embed(video, levels, pose, pose[:, :1])
    cos, sin = model.rope_tables(9, 5)
    mask = causal_mask(5, TINY.tokens_per_frame, "cpu")
    for block in model.blocks:
        x = run_block(block, x, modulation, cos, sin, mask)  # type: ignore[arg-type]
    whole = model.read_out(x)

    cache, pieces = DenseCache(model, 2, 5, first_frame=9), []
    for i in range(5):
        chunk, now = cache.begin_chunk(), slice(i, i + 1)
        pieces.append(model(video[:, now], levels[:, now], pose[:, now], pose[:, :1], 9 + i, chunk.attend))
        chunk.commit()
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


@torch.no_grad()
def test_training_sees_each_frame_as_generation_does(model: WorldModel) -> None:
    history, pose = random_clip(4)
    noisy, levels = torch.randn_like(history), torch.rand(2, 4)
    mask = training_mask(4, TINY.tokens_per_frame, "cpu")
    trained = predict_after_history(model, history, noisy, levels, pose, 3, mask)

    cache, generated = DenseCache(model, 2, 4, first_frame=3), []
    for i in range(4):
        chunk, now = cache.begin_chunk(), slice(i, i + 1)
        where = (pose[:, now], pose[:, :1], 3 + i, chunk.attend)
        generated.append(model(noisy[:, now], levels[:, now], *where))
        model(history[:, now], torch.zeros(2, 1), *where)
        chunk.commit()
    torch.testing.assert_close(torch.cat(generated, 1), trained, rtol=1e-4, atol=1e-5 * trained.abs().max().item())


@torch.no_grad()
def test_rows_at_different_frame_positions_equal_each_row_alone(model: WorldModel) -> None:
    video, pose = random_clip(2)
    starts, level = torch.tensor([4, 31]), torch.full((2, 1), 0.5)

    def second_frame(rows: slice, start: torch.Tensor | int) -> torch.Tensor:
        cache = DenseCache(model, len(video[rows]), 2, first_frame=start)
        reference = pose[rows, :1]
        model(video[rows, :1], level[rows] * 0, pose[rows, :1], reference, start, cache.begin_chunk().attend)
        cache.commit()
        return model(video[rows, 1:], level[rows], pose[rows, 1:], reference, start + 1, cache.begin_chunk().attend)

    together = second_frame(slice(0, 2), starts)
    alone = torch.cat([second_frame(slice(i, i + 1), int(starts[i])) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * alone.abs().max().item())
    moved = second_frame(slice(0, 2), starts + torch.tensor([0, 40]))
    # RoPE is relative: a shift common to a row's frames changes nothing
    torch.testing.assert_close(moved, together, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_window_hides_what_lies_before_it(model: WorldModel) -> None:
    kept, query = torch.randn(6, 1, TINY.tokens_per_frame, 2, 128), torch.randn(1, TINY.tokens_per_frame, 2, 128)

    def read(window: int | None, old: torch.Tensor) -> torch.Tensor:
        cache = DenseCache(model, 1, 6, window=window)
        for frame in [*old, *kept[2:5]]:
            cache.attend(0, frame, frame, frame)
            cache.commit()
        return cache.attend(0, query, kept[5], kept[5])

    old, other = kept[:2], torch.randn_like(kept[:2])
    assert torch.equal(read(3, old), read(3, other))
    assert not torch.equal(read(4, old), read(4, other))
    assert not torch.equal(read(None, old), read(None, other))


@torch.no_grad()
def test_key_outliers_change_the_keys_and_not_the_video(model: WorldModel) -> None:
    video, pose = random_clip(4)
    twin = WorldModel(TINY).eval()
    twin.load_state_dict(with_key_outliers(model.state_dict(), TINY))
    caches = [DenseCache(m, 2, 4) for m in (model, twin)]
    plain, outlying = (
        generate(m, video[:, :2], pose, cache, steps=2) for m, cache in zip((model, twin), caches, strict=True)
    )
    torch.testing.assert_close(plain, outlying, rtol=1e-3, atol=1e-4)
    for layer in range(TINY.layers):
        ratio = caches[1].keys[layer].abs().mean((0, 1)) / caches[0].keys[layer].abs().mean((0, 1))  # [heads, head_dim]
        assert (ratio > 5).sum(-1).tolist() == [16, 16]
        assert ratio.max() < 21
    assert not torch.equal(model.state_dict()["blocks.0.nk.g"], twin.state_dict()["blocks.0.nk.g"])


def test_the_shipped_size_is_22_66_million_parameters_and_wan_axes() -> None:
    with torch.device("meta"):
        model = WorldModel()
    assert sum(p.numel() for p in model.parameters()) == 22_661_952
    assert model.config.rope_pairs == ROPE_PAIRS


def test_rooms_are_textured_lit_and_repeatable() -> None:
    frames = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        worlds = make_worlds(4, generator)
        frames.append(render(worlds, camera_paths(worlds, 6, generator)))
    assert torch.equal(frames[0], frames[1])
    assert frames[0].shape == (4, 6, 3, 64, 64)
    assert frames[0].abs().max() <= 1
    assert 0.3 < frames[0].std() < 0.7
    assert frames[0][:, 0].flatten(1).std(0).mean() > 0.2  # rooms differ from each other


def test_out_and_back_paths_show_every_frame_again() -> None:
    paths = return_paths(worlds=4, given=5, seed=11)
    assert torch.equal(paths.poses, paths.poses.flip(1))
    assert torch.equal(paths.frames, paths.frames.flip(1))
    step = (paths.poses[:, 1:5, :2] - paths.poses[:, :4, :2]).norm(dim=-1)
    assert ((step < 1e-4) | ((step - 0.22).abs() < 1e-4)).all()
    assert copy_last_frame(paths).psnr_first > 86  # the first frame back is the last one out


def test_cameras_keep_out_of_walls() -> None:
    generator = torch.Generator().manual_seed(1)
    worlds = make_worlds(32, generator)
    for shares in ((1.0, 0.0, 0.0), RETURN_PATHS, (0.0, 0.0, 1.0)):
        x, y = camera_paths(worlds, 24, generator, shares)[..., :2].long().unbind(-1)
        assert not worlds.walls[torch.arange(32)[:, None], y, x].any()


def test_training_clips_of_one_draw_come_from_different_rooms() -> None:
    clips = RoomVideos(torch.Generator().manual_seed(0), rooms=4).batches(2, 3, resolution=16)
    (first, poses), (second, _), (third, _) = next(clips), next(clips), next(clips)
    assert first.shape == (2, 3, 3, 16, 16)
    assert poses.shape == (2, 3, 3)
    videos = [*first, *second, *third]
    assert all(not torch.equal(a, b) for i, a in enumerate(videos) for b in videos[:i])


def test_similarity_measures_have_their_known_values() -> None:
    truth = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    assert torch.allclose(psnr(truth + 0.2, truth), torch.full((2, 3), 20.0), atol=1e-3)
    assert torch.allclose(ssim(truth, truth), torch.ones(2, 3), atol=1e-5)
    assert ssim(-truth, truth).max() < 0


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 24, 64)).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_a_file_cut_into_parts_is_put_together_again(tmp_path: Path) -> None:
    whole = tmp_path / "weights.bin"
    whole.write_bytes(torch.randint(0, 256, (32 * 2**20 + 5,), dtype=torch.uint8).numpy().tobytes())
    parts = split_parts(whole, tmp_path / "parts")
    assert [part.stat().st_size for part in parts] == [15 * 2**20, 15 * 2**20, 2 * 2**20 + 5]
    join_parts(tmp_path / "parts", tmp_path / "joined" / "weights.bin")
    assert (tmp_path / "joined" / "weights.bin").read_bytes() == whole.read_bytes()


def test_training_runs_saves_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train.py", "--preset", "tiny", "--device", "cpu", "--max-steps", "2", "--seconds", "600"]
    arguments += ["--own-share", "1", "--checkpoint", str(tmp_path / "state.pt"), "--json", str(tmp_path / "log.json")]
    arguments += ["--export", str(tmp_path / "w.safetensors")]
    monkeypatch.setattr(sys, "argv", arguments)
    train.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--resume"])
    train.main()
    results = json.loads((tmp_path / "log.json").read_text())["results"]
    log = results["log"]
    assert [entry["step"] for entry in log] == [3, 4]
    assert all(0 < entry["loss"] < 100 for entry in log)
    assert results["weights"]["nbytes"] == (tmp_path / "w.safetensors").stat().st_size > 10**6
    assert results["steps"] == 4


def test_a_resumed_run_continues_the_one_that_stopped(tmp_path: Path) -> None:
    def steps(trainer: train.Trainer, count: int) -> list[float]:
        clips = [(torch.rand(2, 4, 3, 32, 32), torch.rand(2, 4, 3)) for _ in range(count)]
        mask = training_mask(4, train.TINY.model.tokens_per_frame, "cpu")
        return [trainer.step(*clip, mask, 1.0, 1.0).item() for clip in clips]

    first, second = (train.Trainer(train.TINY, torch.device("cpu"), 0, compiled=False) for _ in range(2))
    steps(first, 2)
    torch.save(first.state(), tmp_path / "state.pt")
    expected = steps(first, 2)
    second.restore(tmp_path / "state.pt")
    assert steps(second, 2) == pytest.approx(expected, rel=1e-4)
