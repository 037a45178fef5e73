"""Scores of a generated video: against the unquantised cache, against truth, and between rows."""

from typing import Any

import torch
from torch import Tensor
from world_model.evaluate import psnr, ssim

from quality.metrics import gmsd
from quality.paths import KINDS, Paths
from quality.rows import SAME_BYTES_WINDOW

__all__ = ["MAX_PSNR", "judge", "per_path", "revisit_psnr"]

MAX_PSNR = 100.0
SHORT = 8
"""Generated frames of the short-window figure; the long-horizon figure takes as many at the end."""


def per_path(video: Tensor, other: Tensor) -> Tensor:
    """PSNR per path and generated frame, ``[paths, frames]``."""
    return psnr(video, other).clamp_max(MAX_PSNR)


def judge(video: Tensor, dense: Tensor, paths: Paths) -> dict[str, Any]:
    """Onset, short-window, long-horizon and mean figures of `video` ``[paths, frames, 3, height, width]``.

    Under "dense" against the unquantised cache with the same noise, under "truth" against the renderer, under
    "revisits" against the renderer where an unquantised window of the same bytes has lost what is shown again;
    "loss_against_truth" is what the unquantised cache has more.
    """
    result: dict[str, Any] = {}
    for name, other in (("dense", dense), ("truth", paths.frames[:, paths.given :])):
        scores = per_path(video, other)
        kinds = {kind: scores[index :: len(KINDS)].mean().item() for index, kind in enumerate(KINDS)}
        result[name] = {
            "onset": scores[:, 0].mean().item(),
            "short": scores[:, :SHORT].mean().item(),
            "long": scores[:, -SHORT:].mean().item(),
            "mean": scores.mean().item(),
            "ssim": ssim(video, other).mean().item(),
            "gmsd": gmsd(video, other).mean().item(),
            "kinds": kinds,
            "curve": [round(x, 3) for x in scores.mean(0).tolist()],
            "paths": [round(x, 3) for x in scores.mean(1).tolist()],
        }
    unquantised = per_path(dense, paths.frames[:, paths.given :]).mean().item()
    result["loss_against_truth"] = unquantised - result["truth"]["mean"]
    revisits = revisit_psnr(video, paths, SAME_BYTES_WINDOW)
    result["revisits"] = {"mean": revisits.mean().item(), "paths": [round(x, 3) for x in revisits.tolist()]}
    return result


def revisit_psnr(video: Tensor, paths: Paths, window: int) -> Tensor:
    """PSNR against truth per path, on frames whose source has left a window of `window` frames."""
    frame = torch.arange(paths.given, paths.frames.shape[1])
    outside = (frame - paths.source[:, paths.given :] > window).to(video.device)
    scores = per_path(video, paths.frames[:, paths.given :])
    return (scores * outside).sum(1) / outside.sum(1).clamp(min=1)
