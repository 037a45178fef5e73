"""Train a world model from nothing for a given wall-clock time on one device.

    python benchmarks/world_model/train.py --seconds 900 --decay-seconds 400 --export world_model_v1.safetensors
    python benchmarks/world_model/train.py --preset small --seconds 125 --export world_model_small.safetensors

Clips are rendered as they are needed, first short, then long ones. With ``--checkpoint`` and ``--session-seconds`` the
time may be spread over several processes; give ``--resume`` to all but the first.
"""

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

from world_model.evaluate import report, return_paths
from world_model.model import WorldModel, WorldModelConfig
from world_model.muon import Muon
from world_model.objective import Mask, Objective, run_block, training_mask
from world_model.weights import export, join_parts, split_parts
from world_model.world import RoomVideos

__all__ = ["FULL", "SMALL", "TINY", "Recipe", "Stage", "Trainer"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Clips of one length, until a share of the training time is over."""

    frames: int
    batch: int
    until: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run but its length.

    Attributes:
        matrix_lr, other_lr: peak rates of Muon (weights inside the blocks) and AdamW (everything else).
        warmup_steps: linear rise of both; the fall is linear over the last ``decay_seconds`` of the run.
        ema_decay: of the averaged weights that are exported.
        own_after, own_share: from which share of the time on, which share of the steps continues the model's own
            predictions instead of the truth.
        latest_start: clips start at a random frame position up to this one, half of the time at 0.
        rooms: drawn at a time.
    """

    model: WorldModelConfig
    stages: tuple[Stage, ...]
    matrix_lr: float = 0.01
    other_lr: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.998
    own_after: float = 0.6
    own_share: float = 0.5
    latest_start: int = 128
    rooms: int = 1536


FULL = Recipe(
    model=WorldModelConfig(),
    stages=(
        Stage(frames=32, batch=24, until=0.2),
        Stage(frames=64, batch=12, until=1.0),
    ),
)
SMALL = Recipe(
    model=WorldModelConfig(dim=256, layers=6),
    stages=(
        Stage(frames=32, batch=24, until=0.45),  # compiling takes half of it
        Stage(frames=64, batch=12, until=1.0),
    ),
)
"""For a second model within two minutes."""
TINY = Recipe(
    model=WorldModelConfig(resolution=32, dim=128, layers=2),
    stages=(Stage(frames=4, batch=2, until=0.5), Stage(frames=8, batch=1, until=1.0)),
    warmup_steps=1,
    rooms=4,
)


class Trainer:
    """Model, averaged weights, optimisers and the clock, as one thing that can be saved."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int, *, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.recipe, self.device = recipe, device
        self.model = WorldModel(recipe.model).to(device)
        self.average = {name: w.detach().clone() for name, w in self.model.state_dict().items()}
        matrices = [p for p in self.model.blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
        inner = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in inner]
        fused, betas = device.type == "cuda", (0.9, 0.95)
        self.optimizers = (
            Muon(matrices, lr=recipe.matrix_lr),
            torch.optim.AdamW(others, lr=recipe.other_lr, betas=betas, weight_decay=0.0, fused=fused),
        )
        self.objective = Objective(block_forward=torch.compile(run_block, dynamic=False) if compiled else run_block)
        self.videos = RoomVideos(torch.Generator(device).manual_seed(seed), compiled=compiled, rooms=recipe.rooms)
        self.choices = random.Random(seed)
        self.steps, self.elapsed = 0, 0.0

    def step(self, frames: Tensor, poses: Tensor, mask: Mask, rate: float, progress: float) -> Tensor:
        """One update at `rate` of the peak learning rates; the loss, still on the device."""
        recipe = self.recipe
        own = progress >= recipe.own_after and self.choices.random() < recipe.own_share
        start = self.choices.randint(0, recipe.latest_start) if self.choices.random() < 0.5 else 0
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.objective.loss(self.model, frames, poses, start, mask, own)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warm = min(1.0, (self.steps + 1) / recipe.warmup_steps)
        for optimizer, peak in zip(self.optimizers, (recipe.matrix_lr, recipe.other_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(recipe.ema_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_([*self.average.values()], [*self.model.state_dict().values()], 1 - decay)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs, random generators included."""
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "clock": {"steps": self.steps, "elapsed": self.elapsed},
            "videos": self.videos.generator.get_state(),
            "noise": torch.get_rng_state() if self.device.type == "cpu" else torch.cuda.get_rng_state(self.device),
            "choices": self.choices.getstate(),
        }

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint written by this class."""
        state = torch.load(path, map_location="cpu", weights_only=False)
        self.model.load_state_dict(state["model"])
        self.average = {name: w.to(self.device) for name, w in state["average"].items()}
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.elapsed = state["clock"]["steps"], state["clock"]["elapsed"]
        self.videos.generator.set_state(state["videos"])
        if self.device.type == "cpu":
            torch.set_rng_state(state["noise"])
        else:
            torch.cuda.set_rng_state(state["noise"], self.device)
        self.choices.setstate(state["choices"])

    def averaged_model(self) -> WorldModel:
        """The model that is exported, in evaluation mode."""
        model = WorldModel(self.recipe.model).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()


def run(trainer: Trainer, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train until the time or the steps are used up; the log, a line about every ten seconds."""
    recipe, began = trainer.recipe, time.monotonic()
    before, stage, log = trainer.elapsed, None, []
    clips: Iterator[tuple[Tensor, Tensor]] = iter(())
    mask: Mask = torch.empty(0)
    losses: list[Tensor] = []
    first, spoken = trainer.steps, trainer.elapsed
    while trainer.elapsed < args.seconds and trainer.elapsed - before < args.session_seconds:
        if args.max_steps and trainer.steps - first >= args.max_steps:
            break
        progress = trainer.elapsed / args.seconds
        current = next(s for s in recipe.stages if progress < s.until)
        if current != stage:
            stage = current
            clips = trainer.videos.batches(stage.batch, stage.frames, recipe.model.resolution)
            mask = training_mask(stage.frames, recipe.model.tokens_per_frame, trainer.device)
        rate = max(0.0, min(1.0, (args.seconds - trainer.elapsed) / max(args.decay_seconds, 1e-9)))
        losses.append(trainer.step(*next(clips), mask, rate, progress))
        if trainer.steps % 4 == 0 and trainer.device.type == "cuda":
            losses[-1].item()  # or the clock runs ahead of the device
        trainer.elapsed = before + time.monotonic() - began
        if trainer.elapsed - spoken >= 10 or args.max_steps:
            entry = {"seconds": trainer.elapsed, "step": trainer.steps, "frames": stage.frames, "rate": rate}
            loss, pace = torch.stack(losses).mean().item(), len(losses) / (trainer.elapsed - spoken)
            log.append({**entry, "loss": loss, "steps_per_second": pace})
            print(" ".join(f"{name} {value:.4g}" for name, value in log[-1].items()), flush=True)
            losses, spoken = [], trainer.elapsed
    return log


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=900, help="training time, all sessions together")
    parser.add_argument("--decay-seconds", type=float, default=400, help="learning rates fall to 0 over the last ones")
    parser.add_argument("--session-seconds", type=float, default=86400, help="stop this process after so long")
    parser.add_argument("--max-steps", type=int, default=0, help="stop this process after so many steps")
    parser.add_argument("--checkpoint", type=Path, help="write the training state here at the end")
    parser.add_argument("--resume", action="store_true", help="start from --checkpoint")
    parser.add_argument("--export", type=Path, help="write the averaged weights here (BF16 safetensors)")
    parser.add_argument("--export-parts", type=Path, help="and cut them into files of at most 15 MiB in this folder")
    parser.add_argument("--join", type=Path, metavar="FOLDER", help="only put such parts together again as --export")
    parser.add_argument("--evaluate", type=int, nargs="*", metavar="STEPS", help="evaluate with these sampler steps")
    parser.add_argument("--json", type=Path, help="write recipe, log and evaluation here")
    parser.add_argument("--preset", choices=["full", "small", "tiny"], default="full")
    parser.add_argument("--matrix-lr", type=float)
    parser.add_argument("--other-lr", type=float)
    parser.add_argument("--own-share", type=float)
    parser.add_argument("--batch-scale", type=float, default=1.0, help="multiplies every stage's batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train, save, export, evaluate."""
    args = parse()
    if args.join:
        join_parts(args.join, args.export)
        return
    recipe = {"full": FULL, "small": SMALL, "tiny": TINY}[args.preset]
    given = {name: getattr(args, name) for name in ("matrix_lr", "other_lr", "own_share")}
    stages = tuple(replace(s, batch=max(1, round(s.batch * args.batch_scale))) for s in recipe.stages)
    recipe = replace(recipe, stages=stages, **{name: value for name, value in given.items() if value is not None})
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(recipe, device, args.seed, compiled=device.type == "cuda" and not args.no_compile)
    if args.resume:
        trainer.restore(args.checkpoint)
    log = run(trainer, args)
    if args.checkpoint:
        torch.save(trainer.state(), args.checkpoint)
    if args.export:
        facts = {"licence": "CC0-1.0", "steps": str(trainer.steps), "seconds": f"{trainer.elapsed:.0f}"}
        export(trainer.average, args.export, facts)
        if args.export_parts:
            split_parts(args.export, args.export_parts)
    evaluation: list[dict[str, object]] = []
    if args.evaluate is not None:
        paths = return_paths(device, resolution=recipe.model.resolution)
        evaluation = report(trainer.averaged_model(), paths, args.evaluate or [4], [None, 4])
    if args.json:
        results = {**_facts(trainer, args.export), "evaluation": evaluation, "log": log}
        config = {"recipe": asdict(recipe), **vars(args)}
        results_file.write(args.json, results_file.result(device=device, config=config, results=results))


def _facts(trainer: Trainer, weights: Path | None) -> dict[str, Any]:
    """What was trained for how long, and the file it was written to."""
    facts: dict[str, Any] = {
        "training_seconds": trainer.elapsed,
        "steps": trainer.steps,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
    }
    if weights:
        content = weights.read_bytes()
        facts["weights"] = {
            "file": weights.name, "nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
    return facts


if __name__ == "__main__":
    main()
