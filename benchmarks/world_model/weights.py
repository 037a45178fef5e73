"""The weight file: BF16 safetensors with metadata, and its pieces for transports that limit a file's size."""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["export", "join_parts", "split_parts"]

PART_BYTES = 15 * 2**20


def export(weights: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write `weights` as BF16 to the safetensors file `path`."""
    from safetensors.torch import save_file  # noqa: PLC0415 - only exporting needs it

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: w.detach().to(torch.bfloat16).cpu().contiguous() for n, w in weights.items()}, path, metadata)


def split_parts(path: Path, folder: Path) -> list[Path]:
    """Cut a file into pieces of at most 15 MiB, ``<name>.0``, ``<name>.1``, ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        parts.append(folder / f"{path.name}.{number}")
        parts[-1].write_bytes(content[start : start + PART_BYTES])
    return parts


def join_parts(folder: Path, path: Path) -> None:
    """Put together in `path` what :func:`split_parts` left in `folder`."""
    parts = sorted(folder.glob(f"{path.name}.*"), key=lambda part: int(part.suffix[1:]))
    if not parts:
        raise ValueError(f"folder: expected parts named {path.name}.0, .1, ..., got none in {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
