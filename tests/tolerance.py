"""How far a kernel may be from the exact result: measured by PyTorch's own error in the kernel's dtype."""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name


def exact_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``[queries, heads, head_dim]`` to ``[keys, kv_heads, head_dim]`` and log-sum-exp, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The same by `scaled_dot_product_attention` in q's dtype."""
    heads = [x.to(q.dtype).transpose(0, 1)[None] for x in (q, k, v)]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(*heads, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


def assert_as_good(actual: torch.Tensor, exact: torch.Tensor, baseline: torch.Tensor, exact_lse: torch.Tensor) -> None:
    """Maximum and RMS error of `actual` are at most twice those of `baseline`.

    Beyond that, two roundings of the largest output are allowed (with one key the baseline may have no error at all),
    and what rounding a float32 log-sum-exp does to the weights of merged parts, which only shows in float32.
    """
    assert actual.dtype == baseline.dtype
    assert torch.isfinite(actual).all()
    error, allowed = (actual.double() - exact).abs(), (baseline.double() - exact).abs()
    merged = torch.finfo(torch.float32).eps * exact_lse.abs().max()
    floor = (torch.finfo(actual.dtype).eps + merged) * exact.abs().max()
    assert error.max() <= 2 * allowed.max() + 2 * floor
    assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + floor / 2


def assert_lse_as_good(actual: torch.Tensor, exact: torch.Tensor, q: torch.Tensor) -> None:
    """Log-sum-exp is off by no more than a relative rounding of the scores in q's dtype explains."""
    eps = max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(actual.double(), exact, rtol=4 * eps, atol=8 * eps)
