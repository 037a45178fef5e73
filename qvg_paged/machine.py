"""What this machine offers, and what the formats cost at a geometry: facts for ``qvg-paged info``."""

import os
import platform
from importlib import metadata
from typing import Any

import torch

import qvg_paged
from qvg_paged.budget import page_layouts
from qvg_paged.config import CacheConfig, ModelSpec
from qvg_paged.kernels.attention import AttentionPath
from qvg_paged.kernels.backend import has_fp8_attention
from qvg_paged.kernels.formats import FORMATS

__all__ = ["describe_formats", "describe_machine", "describe_paths"]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def describe_machine() -> dict[str, Any]:
    """Versions, devices, and where Triton kernels run."""
    found: dict[str, Any] = {"qvg-paged": qvg_paged.__version__, "Python": platform.python_version()}
    for package in ("torch", "triton", "xformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["CPU threads"] = torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, {memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        found["GPU"] = "none: everything runs in PyTorch"
    if _interpreted():
        found["Triton kernels"] = "in the interpreter (TRITON_INTERPRET=1), for tests"
    else:
        found["Triton kernels"] = "on the GPU" if torch.cuda.is_available() else "not used"
    return found


def _fp8_path() -> str:
    if not torch.cuda.is_available():
        return "the same with the roundings of FP8, in PyTorch"
    fast = has_fp8_attention(torch.device("cuda"))
    return "the same, quantised pages in FP8" if fast else "not here: needs capability 9.0; staged instead"


def describe_paths() -> dict[str, str]:
    """How attention reads pages, and whether that works here."""
    here = torch.cuda.is_available() or _interpreted()
    about = {
        AttentionPath.REFERENCE: "gather in order, one call of PyTorch's attention",
        AttentionPath.STAGED: "decode into bounded scratch, dense attention, merge",
        AttentionPath.STAGED_FP8: _fp8_path(),
        AttentionPath.DIRECT: "Triton kernel that reads pages" if here else "not here: needs a GPU",
        AttentionPath.AUTO: "picks one of the others by measured times",
    }
    return {path.value: about[path] for path in AttentionPath}


def describe_formats(model: ModelSpec, span_frames: int) -> dict[str, dict[str, float]]:
    """Bits per element, ratio to unquantised pages and share of codebooks in the bytes, by format.

    Bytes are the payload of a full span with everything it needs: codes, scales, ids, centroids, balancing.
    """
    return {name: _cost(model, name, span_frames) for name in FORMATS}


def _cost(model: ModelSpec, name: str, span_frames: int) -> dict[str, float]:
    layout = page_layouts(model, CacheConfig(memory="1GiB", format=name, span_frames=span_frames))[-1]
    elements = span_frames * model.frame_nbytes // model.dtype.itemsize
    codebooks = layout.codebook_payload_nbytes
    total = span_frames * layout.page_payload_nbytes + codebooks
    return {
        "bits_per_element": 8 * total / elements,
        "ratio": span_frames * model.frame_nbytes / total,
        "codebook_share": codebooks / total,
    }
