"""K-means of the smoothing stages: seeds, assignment, sums, rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qvg_paged.kernels import reference
from qvg_paged.kernels.codec import encode_span
from qvg_paged.kernels.formats import CentroidType, Codec, Grid
from qvg_paged.kernels.kmeans import fit, round_centroids, seed_rows

BACKENDS = [False, True]
pytestmark = pytest.mark.usefixtures("one_thread")


def clustered(heads: int, tokens: int, dim: int, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens around well separated centres ``[heads, clusters, dim]`` (powers of two: exact in bfloat16)."""
    centres = 4.0 * torch.randint(-2, 3, (heads, clusters, dim)).float()
    label = torch.arange(tokens) % clusters
    return centres[:, label] + 0.1 * torch.randn(heads, tokens, dim), centres


def row_group(x: torch.Tensor, count: int) -> Any:
    """The rows ``[heads, tokens, dim]`` of `x` as the Triton launchers take them, with a workspace of `count`."""
    from qvg_paged.kernels import _tokens_triton  # noqa: PLC0415 - after the interpreter was chosen

    heads, tokens, dim = x.shape
    return _tokens_triton.RowGroup(
        tokens=_tokens_triton.SpanTokens.of(x.transpose(0, 1), tokens), rows=range(heads), inverse=None,
        ids=torch.zeros(1, heads, tokens, dtype=torch.uint8, device=x.device),
        centroids=torch.zeros(1, heads, count, dim, dtype=torch.bfloat16, device=x.device),
        norms=torch.zeros(heads, count, device=x.device),
        scratch=torch.empty(heads * count * (dim + 1) * 4 * 8, dtype=torch.uint8, device=x.device),
    )  # fmt: skip


def assigned(triton: bool, x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    if not triton:
        ids = torch.empty(x.shape[:2], dtype=torch.uint8)
        reference.assign_centroids(x, centroids, ids)
        return ids
    from qvg_paged.kernels import _kmeans_triton  # noqa: PLC0415

    group = row_group(x, centroids.shape[1])
    group.centroids[0] = centroids
    group.norms[:] = centroids.float().square().sum(-1)
    _kmeans_triton.assign(group, 0)
    return group.ids[0]


def distortion(x: torch.Tensor, centroids: torch.Tensor, ids: torch.Tensor) -> float:
    rows = centroids.float().gather(1, ids.long()[..., None].expand(-1, -1, x.shape[-1]))
    return float((x.float() - rows).square().mean())


@pytest.mark.parametrize(("tokens", "count"), [(100, 7), (7, 7), (4096, 256), (513, 100)])
def test_seeds_are_distinct_tokens_spread_over_the_span(tokens: int, count: int) -> None:
    rows = seed_rows(tokens, 3, count, seed=5)
    for head in rows.tolist():
        assert len(set(head)) == count
        assert head == sorted(head)
    assert int(rows.min()) >= 0
    assert int(rows.max()) < tokens
    assert torch.equal(rows, seed_rows(tokens, 3, count, seed=5))
    assert count == tokens or not torch.equal(rows, seed_rows(tokens, 3, count, seed=6))


def test_more_centroids_than_tokens_repeat_tokens() -> None:
    rows = seed_rows(5, 2, 16, seed=0)
    assert set(rows.flatten().tolist()) == set(range(5))


def test_seeding_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    seed_rows(100, 2, 8, seed=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("triton", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_go_to_the_nearest_centroid(triton: bool, dtype: torch.dtype) -> None:
    x, centres = clustered(2, 150, 32, 20)
    ids = assigned(triton, x.to(dtype), centres.bfloat16())
    assert torch.equal(ids, torch.cdist(x.double(), centres.double()).argmin(-1).to(torch.uint8))


@pytest.mark.parametrize("triton", BACKENDS)
def test_among_equal_centroids_equal_tokens_take_the_same(triton: bool) -> None:
    x = torch.randint(-4, 5, (1, 20, 16)).float().repeat(1, 2, 1)  # small integers: scores are exact
    centroids = torch.randint(-4, 5, (1, 5, 16)).bfloat16().repeat(1, 30, 1)
    ids = assigned(triton, x, centroids).long()
    nearest = torch.cdist(x[0].double(), centroids[0].double())
    assert torch.equal(nearest.gather(1, ids[0, :, None])[:, 0], nearest.amin(1))
    assert torch.equal(ids[0, :20], ids[0, 20:])
    if not triton:
        assert int(ids.max()) < 5


@pytest.mark.parametrize("triton", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 70, 2100])
def test_means_are_those_of_the_members_and_without_members_a_centroid_stays(triton: bool, tokens: int) -> None:
    if triton and tokens > 100:
        tokens = 3600  # two runs of the kernel
    x = torch.randn(2, tokens, 16)
    ids = torch.randint(0, 3, (2, tokens)).to(torch.uint8)
    before, means = torch.randn(2, 5, 16).bfloat16(), torch.empty(2, 5, 16)
    if triton:
        from qvg_paged.kernels import _centroids_triton  # noqa: PLC0415

        group = row_group(x, 5)
        group.ids[0], group.centroids[0] = ids, before
        _centroids_triton.update(group, 0, means)
    else:
        reference.centroid_means(x, ids, before, means)
    for head in range(2):
        counts = torch.bincount(ids[head].long(), minlength=5)
        sums = torch.zeros(5, 16).double().index_add_(0, ids[head].long(), x[head].double())
        found = counts > 0
        torch.testing.assert_close(means[head][found].double(), sums[found] / counts[found, None], rtol=0, atol=1e-5)
        assert torch.equal(means[head][~found], before[head][~found].float())


@pytest.mark.parametrize("triton", BACKENDS)
def test_iterations_lower_the_distortion_and_find_separated_clusters(triton: bool) -> None:
    x, _ = clustered(2, 200, 32, 4)
    ids = torch.empty(2, 200, dtype=torch.uint8)
    start = x[:, :6]
    errors = []
    for iterations in range(4):
        found = fit(x, start, ids, iterations=iterations, kind=CentroidType.BF16, triton=triton)
        errors.append(distortion(x, found.values, ids))
    assert errors[1] < errors[0]
    assert errors[3] <= errors[1] * 1.001
    assert errors[3] < 0.02


def test_a_centroid_without_tokens_keeps_its_place() -> None:
    x = torch.randn(1, 50, 16)
    start = torch.cat([x[:, :3], torch.full((1, 1, 16), 100.0)], 1)
    ids = torch.empty(1, 50, dtype=torch.uint8)
    found = fit(x, start, ids, iterations=3, kind=CentroidType.BF16)
    assert torch.equal(found.values[0, 3], torch.full((16,), 100.0).bfloat16())
    assert int(ids.max()) == 2


def test_final_ids_are_nearest_to_the_rounded_centroids() -> None:
    x = torch.randn(2, 300, 16)
    ids, again = torch.empty(2, 300, dtype=torch.uint8), torch.empty(2, 300, dtype=torch.uint8)
    found = fit(x, x[:, :16], ids, iterations=2, kind=CentroidType.FP8)
    reference.assign_centroids(x, found.values, again)
    assert torch.equal(ids, again)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1440.0, 3e4])
def test_fp8_centroids_are_in_range_and_rounding_twice_changes_nothing(size: float) -> None:
    x = torch.randn(2, 8, 16).clamp(-1, 1) * size
    found = round_centroids(x, CentroidType.FP8)
    assert found.scales is not None
    wide = found.stored.float() * found.scales[:, None, None]
    assert torch.equal(wide, found.values.float())
    assert float((wide - x).abs().max()) <= max(size, 1e-9) * 2**-4
    again = round_centroids(found.values.float(), CentroidType.FP8)
    assert torch.equal(again.values, found.values)


def check_rounding(device: str) -> None:
    from qvg_paged.kernels import _centroids_triton  # noqa: PLC0415

    x = torch.randn(5, 37, 64) * torch.tensor([0.0, 1e-6, 1.0, 447.9, 3e4])[:, None, None]
    x[:, 3, 5:9] = torch.tensor([0.0, -0.0, 1e-30, -3e-12])
    group = row_group(torch.zeros(5, 40, 64, device=device), 37)
    stored, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn, device=device), torch.empty(5, device=device)
    _centroids_triton.round_to_fp8(group, 0, x.to(device), stored, scales)
    twin = round_centroids(x, CentroidType.FP8)
    assert twin.scales is not None
    assert torch.equal(scales.cpu(), twin.scales)
    assert torch.equal(stored.cpu().view(torch.uint8), twin.stored.view(torch.uint8))
    assert torch.equal(group.centroids[0].cpu(), twin.values)
    torch.testing.assert_close(group.norms.cpu(), twin.values.float().square().sum(-1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off where there is a GPU")
def test_a_launch_rounds_centroids_to_fp8_as_the_twin_does() -> None:
    check_rounding("cpu")


@pytest.mark.gpu
def test_a_launch_on_a_gpu_rounds_centroids_to_fp8_as_the_twin_does() -> None:
    check_rounding("cuda")


@pytest.mark.parametrize("frame_tokens", [64, 100, 131])
def test_tensor_cores_add_up_the_tokens_of_every_centroid(frame_tokens: int) -> None:
    """The kernel for Hopper, interpreted: two runs of tiles, and frames that end inside one."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    from interpreted_gluon import interpreted  # noqa: PLC0415

    kernel = interpreted(Path(reference.__file__).parent / "_sum_gluon.py").sum_kernel
    frames, heads, dim, count = 3, 2, 64, 130
    x = torch.randn(frames, frame_tokens, heads, dim).bfloat16()
    tokens = frames * frame_tokens
    ids = torch.randint(0, count, (heads * tokens + 64,)).to(torch.uint8)
    starts = (torch.arange(frames) * x.stride(0))[None]
    tiles = frames * -(-frame_tokens // 64)
    runs = -(-tiles // 2)
    sums, counts = torch.zeros(heads, runs, count, dim), torch.zeros(heads, runs, count, dtype=torch.int32)
    kernel[(runs, heads)](
        sums, counts, x, starts, ids, 0, heads, frames, frame_tokens, tokens, count, heads * dim, dim, D=dim, K=256,
        T=64, RUN=128, LANES=128, AHEAD=2,
    )  # fmt: skip
    for head in range(heads):
        mine = ids[head * tokens : (head + 1) * tokens].long()
        exact = torch.zeros(count, dim).double().index_add_(0, mine, x[:, :, head].flatten(0, 1).double())
        torch.testing.assert_close(sums[head].sum(0).double(), exact, rtol=0, atol=1e-4)
        assert torch.equal(counts[head].sum(0), torch.bincount(mine, minlength=count))


@pytest.mark.parametrize("frame_tokens", [64, 100, 131])
@pytest.mark.parametrize("balanced", [False, True])
def test_tensor_cores_find_the_nearest_centroid_of_every_token(frame_tokens: int, balanced: bool) -> None:
    """The kernel for Hopper, interpreted: two programs a row, and frames that end inside a tile."""
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    from interpreted_gluon import interpreted  # noqa: PLC0415

    folder = Path(reference.__file__).parent
    kernel = interpreted(folder / "_assign_gluon.py", [folder / "_sum_gluon.py"]).assign_kernel
    frames, heads, dim, count = 3, 2, 64, 130
    x = torch.randn(frames, frame_tokens, heads, dim).bfloat16()
    centroids = torch.randn(heads, count, dim).bfloat16()
    inverse = torch.randint(1, 3, (heads, dim)).float() if balanced else torch.ones(heads, dim)
    tokens, tiles = frames * frame_tokens, frames * -(-frame_tokens // 64)
    ids = torch.full((heads, tokens), 255, dtype=torch.uint8)
    starts, each = (torch.arange(frames) * x.stride(0))[None], -(-tiles // 2)
    kernel[(2, heads)](
        centroids, centroids.float().square().sum(-1), x, starts, inverse, ids, 0, heads, frames, frame_tokens, tokens,
        count, heads * dim, dim, each, -256, D=dim, K=256, AHEAD=2, BALANCED=balanced, num_warps=4,
    )  # fmt: skip
    for head in range(heads):
        distances = torch.cdist(x[:, :, head].flatten(0, 1).float() * inverse[head], centroids[head].float())
        found = distances.gather(1, ids[head].long()[:, None])[:, 0]
        torch.testing.assert_close(found, distances.amin(1), rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "centroids"), [(torch.bfloat16, 100), (torch.bfloat16, 200), (torch.float32, 100)])
def test_k_means_on_a_gpu_repeats_itself_and_is_as_good_as_on_the_cpu(dtype: torch.dtype, centroids: int) -> None:
    codec = Codec(grid=Grid.INT4, num_centroids=centroids, iterations=5)
    x = (torch.randn(5000, 3, 128) + 3 * torch.randn(40, 3, 128)[torch.arange(5000) % 40]).to(dtype)
    spans = [encode_span(x.to(device), codec) for device in ("cuda", "cuda", "cpu")]
    assert torch.equal(spans[0].buffer, spans[1].buffer)
    errors = []
    for span in spans:
        plane = span.layout.plane("ids").view(span.buffer, span.part_offset(0))[:, 0]
        found = span.layout.plane("centroids").view(span.buffer, 0)[0]
        errors.append(distortion(x.transpose(0, 1), found.cpu(), plane.cpu()))
    assert errors[0] == pytest.approx(errors[2], rel=0.01)


def test_seeds_that_repeated_launches_point_to_stay_where_they_are() -> None:
    pytest.importorskip("triton")
    from qvg_paged.kernels._span_triton import _seeds  # noqa: PLC0415 - after the interpreter was chosen

    first = _seeds(64, 4, 0, torch.device("cpu"))
    for seed in range(1, 400):
        _seeds(64, 4, seed, torch.device("cpu"))
    assert _seeds(64, 4, 0, torch.device("cpu")) is first
