"""Which implementation of a launcher runs: Triton or its PyTorch twin."""

import os
from enum import Enum

import torch

from qvg_paged.kernels.errors import ArgumentError

__all__ = ["Backend", "uses_triton"]


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
