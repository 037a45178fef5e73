"""Checks of tensors and names at the boundary: every message says argument, expectation and value."""

from collections.abc import Sequence

import torch

from qvg_paged.config import ModelSpec
from qvg_paged.errors import ArgumentError

__all__ = ["check_kv", "check_layer", "check_name", "check_queries", "shown"]

MAX_NAME = 256
MAX_SHOWN = 120


def check_layer(layer: int, model: ModelSpec) -> None:
    """Raise unless `layer` is one of the model's."""
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < model.num_layers:
        raise ArgumentError(f"layer: expected 0 to {model.num_layers - 1}, got {layer!r}")


def _check(name: str, x: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], on: torch.device) -> None:
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(f"{name}: expected a tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ArgumentError(f"{name}: expected shape [tokens, heads, head_dim] = {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ArgumentError(f"{name}: expected {wanted}, got {x.dtype}; convert with .to()")
    if x.device != on:
        raise ArgumentError(f"{name}: expected a tensor on {on}, got {x.device}")
    if x.requires_grad:
        raise ArgumentError(f"{name}: expected no gradient (inference only); use torch.no_grad() or .detach()")


def check_kv(k: torch.Tensor, v: torch.Tensor, tokens: int, model: ModelSpec, device: torch.device) -> None:
    """Raise unless `k` and `v` fit `tokens` tokens of the model."""
    shape = (tokens, model.num_kv_heads, model.head_dim)
    _check("k", k, shape, [model.dtype], device)
    _check("v", v, shape, [model.dtype], device)


def check_queries(q: torch.Tensor, tokens: int, model: ModelSpec, device: torch.device) -> None:
    """Raise unless `q` fits `tokens` tokens of the model."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    _check("q", q, (tokens, model.query_heads, model.head_dim), dtypes, device)


def shown(value: object) -> str:
    """A value for a message: whatever it is, one short line."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def check_name(name: str, value: object) -> None:
    """Raise `ArgumentError` unless `value` can name a stream or a tenant. A subclass of str may compare as it likes."""
    if type(value) is not str or not 1 <= len(value) <= MAX_NAME:
        got = f"{len(value)} characters" if isinstance(value, str) and len(value) > MAX_NAME else shown(value)
        kind = "" if type(value) is str or not isinstance(value, str) else f", a {type(value).__name__}; use str()"
        raise ArgumentError(f"{name}: expected a non-empty string of up to {MAX_NAME} characters, got {got}{kind}")
