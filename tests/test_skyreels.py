"""A real architecture: diffusers' SkyReels-V2, its block-causal forward against chunks through the manager."""

from typing import Any

import pytest
import torch
from torch import nn

from qvg_paged import CacheConfig, Chunk, KeyRotation, KVCacheManager, ModelSpec, RoPESpec, Window

diffusers = pytest.importorskip("diffusers")

BLOCK, CHUNKS, GRID, HEADS, HEAD_DIM, LAYERS = 2, 4, (4, 4), 2, 64, 2
SPEC = RoPESpec(head_dim=HEAD_DIM, grid=GRID)


class CachedSelfAttention:
    """Attention processor of one layer: keys and values go to a chunk, which gives the result."""

    def __init__(self, layer: int, rope: KeyRotation) -> None:
        self.layer = layer
        self.rope = rope
        self.chunk: Chunk | None = None
        self.frames = range(0)

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
        assert self.chunk is not None
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        v = attn.to_v(hidden_states)
        q, k, v = (x[0].unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
        q = SPEC.rotate(q, self.frames)
        if self.rope is KeyRotation.APPLIED:
            k = SPEC.rotate(k, self.frames)
        out = self.chunk.attend(self.layer, q, k, v)
        return attn.to_out[0](out.flatten(1)[None])  # type: ignore[no-any-return]


def make_transformer() -> nn.Module:
    torch.manual_seed(11)
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=LAYERS, rope_max_seq_len=32,
    )  # fmt: skip
    for parameter in model.parameters():  # biases and norms start as constants that hide mistakes
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def forward(model: Any, latents: torch.Tensor, timesteps: list[int], text: torch.Tensor) -> torch.Tensor:
    out = model(latents, torch.tensor([timesteps]), text, enable_diffusion_forcing=True, return_dict=False)
    return out[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("rope", list(KeyRotation))
@torch.no_grad()
def test_chunks_through_the_manager_equal_the_models_own_block_causal_forward(rope: KeyRotation) -> None:
    """For every chunk: its noisy pass over clean history, as the model computes it in one masked call."""
    transformer = make_transformer()
    clean = torch.randn(1, 4, BLOCK * CHUNKS, 2 * GRID[0], 2 * GRID[1])
    noisy = torch.randn_like(clean)
    text = torch.randn(1, 5, 16)

    transformer._set_ar_attention(BLOCK)  # type: ignore[operator]
    native = []
    for index in range(CHUNKS):
        start, stop = index * BLOCK, (index + 1) * BLOCK
        latents = torch.cat([clean[:, :, :start], noisy[:, :, start:stop]], 2)
        out = forward(transformer, latents, [0] * start + [500] * BLOCK, text)
        native.append(out[:, :, start:])

    spec = ModelSpec(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM, tokens_per_frame=GRID[0] * GRID[1],
        frames_per_chunk=BLOCK, dtype=torch.float32, rope=rope, rope_spec=SPEC,
    )  # fmt: skip
    cache = KVCacheManager(spec, CacheConfig(memory="16MiB", format="dense"))
    stream = cache.open("video", window=Window(recent_frames=BLOCK * CHUNKS))
    processors = [CachedSelfAttention(layer, rope) for layer in range(LAYERS)]
    for block, processor in zip(transformer.blocks, processors, strict=True):  # type: ignore[arg-type]
        block.attn1.processor = processor

    def chunked(chunk: Chunk, frames: range, latents: torch.Tensor, timestep: int) -> torch.Tensor:
        for processor in processors:
            processor.chunk, processor.frames = chunk, frames
        return forward(transformer, latents[:, :, frames.start : frames.stop], [timestep] * BLOCK, text)

    worst, dropped = 0.0, float("inf")
    for index in range(CHUNKS):
        with stream.begin_chunk() as chunk:
            out = chunked(chunk, chunk.frames, noisy, 500)
            chunked(chunk, chunk.frames, clean, 0)
            chunk.commit()
        scale = native[index].abs().max()
        worst = max(worst, float((out - native[index]).abs().max() / scale))
        if index:
            alone = cache.open(f"forgetful {index}", window=Window(recent_frames=1))
            positions = dict(enumerate(map(float, chunk.frames)))
            with alone.begin_chunk(positions=positions) as blind:
                forgot = chunked(blind, chunk.frames, noisy, 500)
            dropped = min(dropped, float((forgot - native[index]).abs().max() / scale))
    assert worst <= 1e-5
    assert dropped >= 1000 * worst
