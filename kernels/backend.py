"""Which implementation of a launcher runs: Triton or its PyTorch twin."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import lru_cache

import torch

from qvg_paged.kernels.errors import ArgumentError

__all__ = ["Backend", "has_fp8_attention", "kernel_scope", "uses_triton"]


class Backend(Enum):
    """Implementation of a codec or attention launcher."""

    AUTO = "auto"
    """Triton for CUDA tensors, PyTorch elsewhere."""
    TORCH = "torch"
    """The vectorised PyTorch twin, on any device."""
    TRITON = "triton"
    """The Triton kernel; on CPU tensors only in Triton's interpreter."""


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """Whether `backend` means Triton for tensors on `device`.

    Raises:
        ArgumentError: Triton was asked for on a device it cannot run on.
    """
    if backend is Backend.AUTO:
        return device.type == "cuda"
    if backend is Backend.TRITON and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ArgumentError(
            f"backend: expected TORCH or AUTO for tensors on {device}, got TRITON; "
            "set TRITON_INTERPRET=1 before triton is imported to run kernels in its interpreter"
        )
    return backend is Backend.TRITON


@lru_cache
def has_fp8_attention(device: torch.device) -> bool:
    """Whether E4M3 products run on `device`: capability 9.0 and above, or a CPU, where the twin rounds alike."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@contextmanager
def kernel_scope(device: torch.device) -> Iterator[None]:
    """Launch kernels as if nobody had set anything: `device` is the current one, autocast is off.

    Triton launches on the current device whatever the tensors' one is, and under autocast PyTorch rounds where the
    same call elsewhere does not.
    """
    with ExitStack() as scope:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            scope.enter_context(torch.cuda.device(device))
        if torch.is_autocast_enabled(device.type):
            scope.enter_context(torch.autocast(device.type, enabled=False))
        yield
