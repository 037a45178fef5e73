"""The training objective: every frame denoised as it will be in use, after a clean past.

A clip goes through the model twice in one sequence. The first half holds the history frames at noise level 0 and
attends causally, exactly what a cache holds after clean passes. In the second half every frame is noisy and attends
to the history frames before it and to itself, exactly what a frame in progress sees. One pass thus trains all
frames of a clip under the conditions of generation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from world_model.model import Block, WorldModel, rotate

__all__ = ["Objective", "causal_mask", "predict_after_history", "training_mask"]

Mask = BlockMask | Tensor
BlockForward = Callable[[Block, Tensor, Tensor, Tensor, Tensor, Mask], Tensor]


def training_mask(frames: int, tokens_per_frame: int, device: torch.device | str) -> Mask:
    """Who sees whom among `frames` history frames followed by as many noisy ones: for FlexAttention on CUDA, else bool.

    A bool mask is ``[tokens, tokens]``, true where the query (row) sees the key (column).
    """
    half = frames * tokens_per_frame

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        noisy_query, noisy_key = query >= half, key >= half
        query_frame = (query - half * noisy_query) // tokens_per_frame
        key_frame = (key - half * noisy_key) // tokens_per_frame
        past = ~noisy_key & (key_frame + noisy_query <= query_frame)  # a noisy frame sees earlier frames only
        return past | (noisy_query & noisy_key & (key_frame == query_frame))

    if torch.device(device).type == "cuda":
        return create_block_mask(visible, None, None, 2 * half, 2 * half, device=str(device))
    index = torch.arange(2 * half, device=device)
    return visible(index, index, index[:, None], index[None])


def causal_mask(frames: int, tokens_per_frame: int, device: torch.device | str) -> Tensor:
    """Plain causality between whole frames, as a bool mask ``[tokens, tokens]``."""
    frame = torch.arange(frames * tokens_per_frame, device=device) // tokens_per_frame
    return frame[:, None] >= frame[None]


def run_block(block: Block, x: Tensor, modulation: Tensor, cos: Tensor, sin: Tensor, mask: Mask) -> Tensor:
    """One transformer block over whole clips."""
    q, k, v = block.project(x, modulation, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, rotate(k, cos, sin), v))
    if isinstance(mask, BlockMask):
        attended = flex_attention(q, k, v, block_mask=mask)
    else:
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert isinstance(attended, Tensor)
    return block.finish(x, attended.transpose(1, 2), modulation)


def predict_after_history(
    model: WorldModel,
    history: Tensor,
    noisy: Tensor,
    noise_level: Tensor,
    pose: Tensor,
    first_frame: int,
    mask: Mask,
    block_forward: BlockForward = run_block,
) -> Tensor:
    """Clean frames predicted from `noisy` ones, each after the `history` frames before it.

    `history`, `noisy`: ``[batch, frames, 3, resolution, resolution]``; `noise_level`: ``[batch, frames]`` of the noisy
    frames; `mask`: from :func:`training_mask`. Returns a tensor like `noisy`.
    """
    frames = noisy.shape[1]
    levels = torch.cat([torch.zeros_like(noise_level), noise_level], 1)
    x, modulation = model.embed(torch.cat([history, noisy], 1), levels, pose.repeat(1, 2, 1), pose[:, :1])
    cos, sin = (table.repeat(1, 2, 1) for table in model.rope_tables(first_frame, frames))
    for block in model.blocks:
        assert isinstance(block, Block)
        x = block_forward(block, x, modulation, cos, sin, mask)
    return model.read_out(x[:, x.shape[1] // 2 :])


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a training loss is drawn.

    Attributes:
        shift: noise levels follow the sampler's schedule, ``shift u / (1 + (shift - 1) u)`` of a uniform u.
        least_level: errors are divided by the noise level (a velocity loss), but not by less than this.
        block_forward: :func:`run_block`, perhaps compiled.
    """

    shift: float = 3.0
    least_level: float = 0.2
    block_forward: BlockForward = run_block

    def loss(self, model: WorldModel, frames: Tensor, pose: Tensor, first_frame: int, mask: Mask, own: bool) -> Tensor:
        """Mean squared velocity error.

        With `own`, each clip's history is the truth up to a random frame and the model's own predictions from there
        on, so that it learns to continue from what it generates.
        """
        history = frames
        if own:
            predicted = self._predict(model, frames, frames, pose, first_frame, mask, least=0.7)[0].detach()
            switch = torch.randint(0, frames.shape[1], (len(frames), 1), device=frames.device)
            later = torch.arange(frames.shape[1], device=frames.device) >= switch
            history = torch.where(later[..., None, None, None], predicted.clamp(-1, 1), frames)
        predicted, level = self._predict(model, history, frames, pose, first_frame, mask)
        weight = 1 / level.clamp_min(self.least_level)
        return ((predicted - frames) * weight[..., None, None, None]).pow(2).mean()

    def _predict(
        self,
        model: WorldModel,
        history: Tensor,
        frames: Tensor,
        pose: Tensor,
        first_frame: int,
        mask: Mask,
        least: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        uniform = torch.rand(frames.shape[:2], device=frames.device)
        level = self.shift * uniform / (1 + (self.shift - 1) * uniform) * (1 - least) + least
        t = level[..., None, None, None]
        noisy = (1 - t) * frames + t * torch.randn_like(frames)
        clean = predict_after_history(model, history, noisy, level, pose, first_frame, mask, self.block_forward)
        return clean.float(), level
