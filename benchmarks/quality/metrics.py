"""Frames against frames beyond PSNR and SSIM, and what a difference of means is worth."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["gmsd", "paired_interval"]

GMSD_C = 0.0026
"""Stability constant of the paper (170 for grey levels 0 ... 255), for frames in [0, 1]."""


def gmsd(video: Tensor, truth: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation per frame (Xue et al. 2014, eq. 5); 0 is equal, larger is worse.

    `video`, `truth`: ``[..., 3, height, width]`` in [-1, 1]. Luma, no downsampling: frames are small already.
    """
    weights = torch.tensor([0.299, 0.587, 0.114], device=video.device)
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3, device=video.device) / 3
    kernel = torch.stack([prewitt, prewitt.T])[:, None]

    def gradient(frames: Tensor) -> Tensor:
        luma = (frames.float().flatten(0, -4) / 2 + 0.5).mul(weights[:, None, None]).sum(1, keepdim=True)
        return functional.conv2d(luma, kernel, padding=1).square().sum(1).sqrt()

    ours, theirs = gradient(video), gradient(truth)
    similarity = (2 * ours * theirs + GMSD_C) / (ours.square() + theirs.square() + GMSD_C)
    return similarity.flatten(1).std(1, correction=0).view(video.shape[:-3])


def paired_interval(ours: Tensor, theirs: Tensor, *, draws: int = 10000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``ours - theirs`` over paths and its 95 % percentile bootstrap interval (paths are resampled)."""
    difference = (ours - theirs).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(difference), (draws, len(difference)), generator=generator)
    means = difference[chosen].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high
