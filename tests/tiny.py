"""A store small enough to test quickly, and content that tells streams, frames and layers apart."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from qvg_paged import FORMATS, CacheConfig, Chunk, KVCacheManager, ModelSpec, PageFormat, ScaleRule, Stream, Window
from qvg_paged.budget import Budget
from qvg_paged.kernels.encode import encode_part

TOKENS, HEADS, HEAD_DIM, LAYERS, SPAN = 8, 2, 64, 2, 4
FAST: PageFormat = FORMATS["qvg4-int2"].with_codecs(iterations=1, num_centroids=2, scale_rule=ScaleRule.ABSMAX)
WINDOW = Window(sink_frames=1, recent_frames=8)


def make_model(**changes: Any) -> ModelSpec:
    """Two layers, two heads, eight tokens a frame, three frames a chunk, float32."""
    fields: dict[str, Any] = {
        "num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": HEAD_DIM, "tokens_per_frame": TOKENS,
        "frames_per_chunk": 3, "dtype": torch.float32,
    }  # fmt: skip
    return ModelSpec(**{**fields, **changes})


def make_cache(pool: int = 2 << 20, model: ModelSpec | None = None, **changes: Any) -> KVCacheManager:
    """A manager whose pool has about `pool` bytes, whatever staging and workspace take besides."""
    model = model or make_model()
    fields: dict[str, Any] = {"format": FAST, "span_frames": SPAN, "staging": "1MiB", **changes}
    roomy = Budget.split(model, CacheConfig(memory="1GiB", **fields))
    memory = pool + roomy.staging + roomy.encode
    overhead = max(512 << 10, memory // 63)
    return KVCacheManager(model, CacheConfig(memory=memory + overhead, **fields))


def content(model: ModelSpec, seed: int) -> torch.Tensor:
    """K and V of one frame, ``[num_layers, 2, tokens, heads, head_dim]``; every seed differs, and so do layers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (model.num_layers, 2, model.tokens_per_frame, model.num_kv_heads, model.head_dim)
    return torch.randn(shape, generator=generator).to(model.dtype)


def write(chunk: Chunk, seeds: list[int], layers: range | None = None) -> None:
    """Fill the chunk's frames with the content of `seeds`, one per frame."""
    model = chunk.stream.manager.model
    frames = torch.stack([content(model, seed) for seed in seeds], 2)  # [layers, 2, frames, tokens, heads, head_dim]
    for layer in layers or range(model.num_layers):
        k, v = frames[layer].flatten(1, 2)
        chunk.write(layer, k, v)


def grow(stream: Stream, frames: int, first_seed: int = 0, per_chunk: int = 3) -> list[int]:
    """Commit `frames` further frames; their seeds, by order."""
    seeds = list(range(first_seed, first_seed + frames))
    for start in range(0, frames, per_chunk):
        part = seeds[start : start + per_chunk]
        with stream.begin_chunk(len(part)) as chunk:
            write(chunk, part)
            chunk.commit()
    return seeds


def dense_bytes(model: ModelSpec, seed: int) -> bytes:
    """What an unquantised page of that content must hold (its padding left out)."""
    return content(model, seed).view(torch.uint8).numpy().tobytes()


def span_bytes(cache: KVCacheManager, seeds: Sequence[int], fmt: int = -1) -> list[bytes]:
    """What the quantised page of each frame of a span must hold, codebook appended: encoded apart from any pool."""
    model, layout = cache.model, cache.layouts[fmt]
    frames = torch.stack([content(model, seed) for seed in seeds], 2)
    book = len(seeds) * layout.page_nbytes
    buffer = torch.zeros(book + layout.codebook_nbytes, dtype=torch.uint8)
    for layer in range(model.num_layers):
        k, v = frames[layer].flatten(1, 2)
        for x, part, offset, inside in (
            (k, layout.key, layout.key_offset(layer), layout.key_codebook_offset(layer)),
            (v, layout.value, layout.value_offset(layer), layout.value_codebook_offset(layer)),
        ):
            pages = [index * layout.page_nbytes + offset for index in range(len(seeds))]
            encode_part(x, part, buffer, pages, book + inside if part.codebook_planes else None)
    inside, codebook = layout.num_layers * layout.layer_nbytes, layout.num_layers * layout.codebook_layer_nbytes
    tail = buffer[book : book + codebook].numpy().tobytes()
    return [page[:inside].numpy().tobytes() + tail for page in buffer[:book].view(len(seeds), -1)]


def page_bytes(stream: Stream) -> dict[int, bytes]:
    """Page and codebook bytes of every stored frame; padding after the last layer is left out (it keeps the fill)."""
    pool, found = stream.manager.store.pool, {}
    for frame, page in stream.pages.items():
        layout = stream.manager.layouts[page.format]
        parts = [(page.slot, layout.layer_nbytes)]
        if page.codebook:
            parts.append((page.codebook.slot, layout.codebook_layer_nbytes))
        found[frame] = b"".join(
            pool.bytes_of(slot)[: layout.num_layers * nbytes].numpy().tobytes() for slot, nbytes in parts
        )
    return found


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention of ``[tokens, heads, head_dim]`` tensors."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)
