"""How well a world model remembers: out-and-back paths, the way back generated and compared with the renderer.

    python benchmarks/world_model/evaluate.py --weights benchmarks/world_model/weights/world_model_v1.safetensors

prints one JSON object per line: the configuration, then PSNR and SSIM with all history and with a short window.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from world_model.model import WorldModel, load_model
from world_model.sampling import DenseCache, generate
from world_model.world import RETURN_PATHS, camera_paths, make_worlds, render

__all__ = ["ReturnPaths", "Score", "copy_last_frame", "evaluate", "psnr", "return_paths", "ssim"]


@dataclass(frozen=True, kw_only=True)
class ReturnPaths:
    """Held-out clips whose second half shows again what the first half showed, in reverse.

    Attributes:
        frames: ``[worlds, 2 * given, 3, resolution, resolution]``, the renderer's truth.
        poses: ``[worlds, 2 * given, 3]``.
        given: frames of the way out.
    """

    frames: Tensor
    poses: Tensor
    given: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """Generated frames against the truth: decibels and structural similarity, means over paths."""

    psnr: float
    psnr_first: float
    psnr_last: float
    ssim: float

    def as_dict(self) -> dict[str, float]:
        """Rounded to what is worth printing."""
        return {name: round(value, 4) for name, value in vars(self).items()}


def return_paths(
    device: torch.device | str = "cpu", *, worlds: int = 24, given: int = 32, resolution: int = 64, seed: int = 7
) -> ReturnPaths:
    """The held-out clips that `seed` names, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    rooms = make_worlds(worlds, generator, device)
    poses = camera_paths(rooms, 2 * given, generator, RETURN_PATHS)
    return ReturnPaths(frames=render(rooms, poses, resolution), poses=poses, given=given)


def psnr(video: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per frame, decibels, of ``[..., 3, height, width]`` frames in [-1, 1]."""
    error = (video.float() - truth.float()).pow(2).mean((-1, -2, -3))
    return 10 * torch.log10(4 / error.clamp_min(1e-8))


def ssim(video: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity per frame (Wang et al. 2004: 11x11 Gaussian window, sigma 1.5), frames in [-1, 1]."""
    x, y = (t.float().flatten(0, -4) / 2 + 0.5 for t in (video, truth))
    offset = torch.arange(11, device=x.device) - 5.0
    bell = torch.exp(-offset.pow(2) / (2 * 1.5**2))
    kernel = torch.outer(bell, bell).div(bell.sum() ** 2).expand(3, 1, 11, 11)
    blurred = functional.conv2d(torch.cat([x, y, x * x, y * y, x * y]), kernel, groups=3)
    mean_x, mean_y, xx, yy, xy = blurred.chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    similarity: Tensor = (luminance * structure).mean((-1, -2, -3))
    return similarity.view(video.shape[:-3])


def score(video: Tensor, paths: ReturnPaths) -> Score:
    """Compare the way back ``[worlds, given, ...]`` with the truth."""
    truth = paths.frames[:, paths.given :]
    per_frame = psnr(video, truth).mean(0)
    return Score(
        psnr=per_frame.mean().item(),
        psnr_first=per_frame[0].item(),
        psnr_last=per_frame[-1].item(),
        ssim=ssim(video, truth).mean().item(),
    )


def copy_last_frame(paths: ReturnPaths) -> Score:
    """What repeating the last given frame scores: the floor of any model."""
    last = paths.frames[:, paths.given - 1 : paths.given]
    return score(last.expand_as(paths.frames[:, paths.given :]), paths)


@torch.no_grad()
def evaluate(model: WorldModel, paths: ReturnPaths, *, steps: int, window: int | None = None, seed: int = 0) -> Score:
    """Generate the way back from an unquantised cache that shows all history or the last `window` frames.

    BF16 on a GPU, float32 on a CPU.
    """
    device = paths.frames.device
    cache = DenseCache(model, len(paths.poses), paths.poses.shape[1], window=window)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        video = generate(model, paths.frames[:, : paths.given], paths.poses, cache, steps=steps, seed=seed)
    return score(video[:, paths.given :], paths)


def report(
    model: WorldModel, paths: ReturnPaths, steps: list[int], windows: list[int | None]
) -> list[dict[str, object]]:
    """One row per number of steps and window, and the copy-last-frame row; printed as they come."""
    rows: list[dict[str, object]] = [{"history": "copy-last-frame", **copy_last_frame(paths).as_dict()}]
    print(json.dumps(rows[0]), flush=True)
    for count in steps:
        for window in windows:
            result = evaluate(model, paths, steps=count, window=window).as_dict()
            rows.append({"history": "all" if window is None else f"last {window} frames", "steps": count, **result})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="Euler steps per frame")
    parser.add_argument("--window", type=int, default=4, help="frames kept in the short-memory control")
    parser.add_argument("--worlds", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7, help="names the held-out worlds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write all rows here")
    args = parser.parse_args()
    model = load_model(args.weights, args.device)
    paths = return_paths(args.device, worlds=args.worlds, resolution=model.config.resolution, seed=args.seed)
    rows = report(model, paths, args.steps, [None, args.window])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
