"""Result files: what was measured, by which command, on what. Every number in README and docs comes from one."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["SCHEMA", "commit", "describe_device", "device_name", "result", "versions", "write"]

SCHEMA = "qvg-paged.result/1"
PACKAGES = ("qvg-paged", "torch", "triton", "xformers", "numpy")
ROOT = Path(__file__).resolve().parents[1]


def result(
    *,
    device: torch.device | str,
    config: object,
    results: object,
    warnings: Sequence[str] = (),
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Content of a result file.

    Args:
        device: what was measured.
        config: options of the command, a dataclass or a mapping.
        results: rows and what belongs to them; anything JSON can hold, dataclasses and enums included.
        warnings: what a reader of the numbers should know.
        command: the command line; None for that of this process.
    """
    words = [_program(), *sys.argv[1:]] if command is None else list(command)
    return {
        "schema": SCHEMA,
        "command": " ".join(map(_portable, words)),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device(device),
        "versions": versions(),
        "config": _plain(config),
        "results": _plain(results),
        "warnings": list(warnings),
    }


def _program() -> str:
    started = Path(sys.argv[0])
    return "qvg-paged" if started.name == "__main__.py" else started.name


def _portable(word: str) -> str:
    """`word` without the folders of this machine: a path from the checkout's root on, any other by its name."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def write(path: Path | str, content: Mapping[str, Any]) -> Path:
    """Write a result file, folders included; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_plain(content), indent=1) + "\n")
    part.replace(path)
    return path


def commit() -> str | None:
    """Commit of the checkout, ``-dirty`` with local changes to tracked files; None where git cannot say.

    Where a copy without its history is measured, ``QVG_PAGED_COMMIT`` names it.
    """
    if named := os.environ.get("QVG_PAGED_COMMIT"):
        return named
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def device_name(device: torch.device | str) -> str:
    """Name of a device, as in ``"NVIDIA H200"``; for a CPU its model."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """Name, memory and host of what was measured."""
    device = torch.device(device)
    about: dict[str, Any] = {"type": device.type, "name": device_name(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["memory_nbytes"] = properties.total_memory
        about["capability"] = f"{properties.major}.{properties.minor}"
    return {**about, "cpu": _cpu_name(), "cpu_cores": _cores(), "cpu_threads": torch.get_num_threads()}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of Python, the operating system and the packages that matter; None for one that is absent."""
    system = f"{platform.system()} {platform.machine()}"
    found: dict[str, str | None] = {"python": platform.python_version(), "system": system}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "cuda": torch.version.cuda}


def _plain(value: Any) -> Any:
    """`value` as JSON knows it."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return _portable(str(value))
