import pytest
import torch
from tolerance import exact_attention

from qvg_paged.kernels import partials as partials_module
from qvg_paged.kernels._merge_triton import MOST_PIECES
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.merge import merge_into_reference, merge_partials, merge_pieces
from qvg_paged.kernels.partials import Partials, run_merges

BACKENDS = [Backend.TORCH, Backend.TRITON]
EMPTY = float("-inf")


def partials(count: int, rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, rows, 3, dim), torch.randn(count, rows, 3) * 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_parts_of_the_keys_gives_attention_to_all_of_them(backend: Backend) -> None:
    q, k, v = torch.randn(9, 3, 64), torch.randn(50, 3, 64), torch.randn(50, 3, 64)
    pieces = [exact_attention(q, k[a:b], v[a:b], 0.3) for a, b in ((0, 1), (1, 33), (33, 50))]
    out, lse = torch.empty(9, 3, 64), torch.empty(9, 3)
    stacked = (torch.stack([piece[i] for piece in pieces]).float() for i in range(2))
    merge_partials(*stacked, out, lse, backend=backend)
    exact, exact_lse = exact_attention(q, k, v, 0.3)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_without_keys_is_never_read(backend: Backend) -> None:
    parts, lses = partials(4, 5, 64)
    empty = torch.rand(4, 5, 3) < 0.5
    empty[:, 0] = True
    lses[empty] = EMPTY
    clean_out, clean_lse, out, lse = (torch.empty(shape) for shape in ((5, 3, 64), (5, 3)) * 2)
    merge_partials(parts.masked_fill(empty[..., None], 0.0), lses, clean_out, clean_lse, backend=backend)
    merge_partials(parts.masked_fill(empty[..., None], float("nan")), lses, out, lse, backend=backend)
    assert torch.equal(out, clean_out)
    assert torch.equal(lse, clean_lse)
    assert (out[0] == 0).all()
    assert (lse[0] == EMPTY).all()


@pytest.mark.parametrize("rows", [5, 700])
def test_many_partials_of_few_and_of_many_rows_are_merged_by_triton_as_by_pytorch(rows: int) -> None:
    parts, lses = partials(70, rows, 16)
    lses[torch.rand(70, rows, 3) < 0.3] = EMPTY
    made = [(torch.empty(rows, 3, 16), torch.empty(rows, 3)) for _ in BACKENDS]
    for (out, lse), backend in zip(made, BACKENDS, strict=True):
        merge_partials(parts, lses, out, lse, backend=backend)
    torch.testing.assert_close(made[1][0], made[0][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made[1][1], made[0][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_merging_is_associative_up_to_rounding(backend: Backend) -> None:
    parts, lses = partials(5, 6, 128)
    lses[2, :3] = EMPTY
    out, lse = torch.empty(6, 3, 128), torch.empty(6, 3)
    merge_partials(parts, lses, out, lse, backend=backend)
    pair_out, pair_lse = torch.empty(2, 6, 3, 128), torch.empty(2, 6, 3)
    for i, some in enumerate((slice(0, 3), slice(3, 5))):
        merge_partials(parts[some], lses[some], pair_out[i], pair_lse[i], backend=backend)
    again, again_lse = torch.empty_like(out), torch.empty_like(lse)
    merge_partials(pair_out, pair_lse, again, again_lse, backend=backend)
    torch.testing.assert_close(again, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(again_lse, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_that_lie_anywhere_merge_to_what_contiguous_ones_do(backend: Backend) -> None:
    parts, lses = torch.randn(4, 2, 3, 2, 5, 64), torch.randn(4, 2, 3, 2, 5) * 5
    lses[1, 0] = lses[0, 0, 0] = lses[:, 1, 2] = EMPTY
    parts[lses == EMPTY] = float("nan")
    strided = [(parts[0], lses[0]), (parts[1].half(), lses[1])]
    for i in (2, 3):
        folded = parts[i].transpose(1, 2).contiguous(), lses[i].transpose(1, 2).contiguous()
        strided.append((folded[0].transpose(1, 2), folded[1].transpose(1, 2)))
    out, lse, whole, whole_lse = (torch.empty(shape) for shape in ((2, 3, 2, 5, 64), (2, 3, 2, 5)) * 2)
    merge_pieces(strided, out, lse, backend=backend)
    parts[1] = parts[1].half()
    merge_partials(parts, lses, whole, whole_lse, backend=backend)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, whole_lse)
    first, first_lse = parts[0].clone(), lses[0].clone()  # the running result is one of the pieces
    merge_pieces([(first, first_lse), *strided[1:]], first, first_lse, backend=backend)
    assert torch.equal(first, out)
    assert torch.equal(first_lse, lse)


def test_merging_two_empty_results_stays_empty() -> None:
    out, lse = torch.full((1, 1, 2, 64), float("nan")), torch.full((1, 1, 2), EMPTY)
    merge_into_reference(out, lse, out.clone(), lse.clone())
    assert (out == 0).all()
    assert (lse == EMPTY).all()


def test_merges_run_ahead_meet_every_combination_of_types_and_a_full_set_of_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()

    def merge(pieces: list[tuple[torch.Tensor, torch.Tensor]], out: torch.Tensor, _: torch.Tensor) -> None:
        assert len(pieces) <= MOST_PIECES
        seen.add((pieces[0][0].dtype, pieces[-1][0].dtype, out.dtype))

    monkeypatch.setattr(partials_module, "merge_pieces", merge)
    assert MOST_PIECES == partials_module.PENDING + 1
    run_merges(64, torch.bfloat16, torch.device("cpu"))
    half, single = torch.bfloat16, torch.float32
    assert seen == {(half, half, half), (single, half, single), (single, half, half), (single, single, half)}


def test_pieces_of_some_of_the_sequences_merge_into_their_rows_alone() -> None:
    q, k, v = torch.randn(4, 5, 2, 64), torch.randn(4, 40, 2, 64), torch.randn(4, 40, 2, 64)
    out, lse = torch.empty(4, 5, 2, 1, 64), torch.empty(4, 5, 2, 1)
    whole = Partials(out, lse, torch.full((1 << 16,), 0xFF, dtype=torch.uint8))
    keys = {0: range(0), 1: range(0), 2: range(0), 3: range(0)}
    for members, count in ((range(3), 10), (range(3), 3), (range(2), 7), (range(1), 4), (range(2), 2), (range(1), 9)):
        pieces = []
        for b in members:
            some = slice(keys[b].stop, keys[b].stop + count)
            keys[b] = range(keys[b].stop + count)
            pieces.append(exact_attention(q[b], k[b, some], v[b, some], 0.3))
        piece, sums = (torch.stack([found[i] for found in pieces]).float().transpose(1, 2) for i in range(2))
        whole.add(piece, sums, members)
    whole.finish()
    for b in range(3):
        exact, exact_lse = exact_attention(q[b], k[b, : keys[b].stop], v[b, : keys[b].stop], 0.3)
        torch.testing.assert_close(out[b, :, :, 0].double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[b, :, :, 0].double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert (out[3] == 0).all()
    assert (lse[3] == EMPTY).all()
