"""Scratch pages: every token of K and V lands where a page of its frame has it, whatever the pages' places."""

from typing import Any

import pytest
import torch
from tiny import WINDOW, make_cache, make_model

from qvg_paged import KVCacheManager
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.store import can_store
from qvg_paged.page import Page
from qvg_paged.scratch import ScratchWriter

pytest.importorskip("triton")
PLACES = {"neighbours": [0, 1, 2], "at equal distances": [0, 2, 4], "anywhere": [3, 0, 1], "alone": [2]}


def cut(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers in other memory."""
    if how == "part of a wider tensor":
        return torch.cat([x * 0, x, x * 0], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if how == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "at an odd address":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    return x


def written(cache: KVCacheManager, pages: list[Page], backend: Backend, k: torch.Tensor, v: torch.Tensor) -> Any:
    cache.store.pool.buffer.zero_()
    layout = cache.layouts[0]
    for layer in (0, cache.model.num_layers - 1):
        ScratchWriter(cache.store.pool, layout, pages, backend).write(layer, k, v)
    return cache.store.pool.buffer.clone()


@pytest.mark.parametrize("how", ["contiguous", "part of a wider tensor", "heads first", "at an odd address"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_launch_and_two_copies_leave_the_same_bytes(places: str, how: str, dtype: torch.dtype) -> None:
    cache = make_cache(model=make_model(dtype=dtype))
    pages = cache.store.reserve("t", 5, 0, 0).scratch
    chosen = [pages[i] for i in PLACES[places]]
    model = cache.model
    shape = (len(chosen) * model.tokens_per_frame, model.num_kv_heads, model.head_dim)
    k, v = (cut(torch.randn(shape).to(dtype), how) for _ in range(2))
    expected = written(cache, chosen, Backend.TORCH, k, v)
    assert torch.equal(written(cache, chosen, Backend.TRITON, k, v), expected)
    layout = cache.layouts[0]
    start = chosen[0].id * 256 + layout.value_offset(model.num_layers - 1)
    nbytes = model.tokens_per_frame * model.num_kv_heads * model.head_dim * k.element_size()
    assert torch.equal(expected[start : start + nbytes].view(dtype), v[: model.tokens_per_frame].flatten())


def test_what_has_no_contiguous_rows_is_left_to_copies() -> None:
    x = torch.zeros(6, 2, 8)
    assert can_store(x, x, Backend.TRITON)
    assert not can_store(x, x, Backend.AUTO), "no GPU"
    assert not can_store(x, cut(x, "heads first"), Backend.TRITON)
    assert not can_store(x[:, :, :4], x[:, :, :4], Backend.TRITON)
    odd = torch.zeros(6, 1, 4)
    assert not can_store(odd, odd, Backend.TRITON)


def test_a_chunk_writes_through_the_writer_of_its_scratch() -> None:
    cache = make_cache()
    with cache.open("a", window=WINDOW).begin_chunk(2) as chunk:
        assert chunk.writer is chunk.writer
        assert chunk.writer._step == chunk.reservation.scratch[1].id - chunk.reservation.scratch[0].id


@pytest.mark.gpu
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("how", ["contiguous", "part of a wider tensor", "heads first", "at an odd address"])
def test_a_gpu_stores_the_same_bytes_by_launch_and_by_copies(places: str, how: str) -> None:
    model = make_model(dtype=torch.bfloat16, num_kv_heads=3, head_dim=128, tokens_per_frame=1560)
    cache = make_cache(pool=64 << 20, model=model, device="cuda", staging="64MiB")
    pages = cache.store.reserve("t", 5, 0, 0).scratch
    chosen = [pages[i] for i in PLACES[places]]
    shape = (len(chosen) * model.tokens_per_frame, model.num_kv_heads, model.head_dim)
    k, v = (cut(torch.randn(shape, device="cuda").bfloat16(), how) for _ in range(2))
    expected = written(cache, chosen, Backend.TORCH, k, v)
    assert torch.equal(written(cache, chosen, Backend.TRITON, k, v), expected)
