"""Correctness before speed: attention on sampled queries and heads against exact attention in float64.

The tolerance is what PyTorch's own attention is off by in the same number type on the same inputs, times two. For paths
in FP8, PyTorch computes with queries, keys, values and weights rounded to E4M3 under one scale a head.
"""

from collections.abc import Callable, Sequence
from enum import Enum

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from bench.rows import Gate

__all__ = ["AttentionGate", "Precision"]

Truth = Callable[[int, list[int]], tuple[torch.Tensor, torch.Tensor]]
FACTOR = 2.0
SAMPLED_QUERIES = 16
SAMPLED_HEADS = 4
SAMPLED_SEQUENCES = 2
E4M3_MAX = 448.0
WEIGHT_SCALE = 256.0


class Precision(Enum):
    """Number type whose error is tolerated."""

    BF16 = "bf16"
    FP8 = "fp8"
    EITHER = "either"
    """BF16, else FP8: for a path that picks one of the others."""


def _spread(count: int, most: int) -> list[int]:
    """At most `most` numbers below `count`, first and last included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


class AttentionGate:
    """Checks outputs for queries ``[total_q, q_heads, head_dim]`` whose sequence b owns rows ``cu[b]:cu[b + 1]``.

    Args:
        q: queries.
        cu: ``batch + 1`` integers.
        kv_heads: KV heads.
        truth: K and V ``[keys, chosen heads, head_dim]`` float32 of a sequence for a list of KV heads.
    """

    def __init__(self, q: torch.Tensor, cu: Sequence[int], kv_heads: int, truth: Truth) -> None:
        group = q.shape[1] // kv_heads
        heads = _spread(kv_heads, SAMPLED_HEADS)
        self._q_heads = [head * group + (head % group) for head in heads]
        self._samples: list[tuple[list[int], torch.Tensor, dict[Precision, torch.Tensor]]] = []
        for b in _spread(len(cu) - 1, SAMPLED_SEQUENCES):
            rows = [cu[b] + i for i in _spread(cu[b + 1] - cu[b], SAMPLED_QUERIES)]
            k, v = (x.transpose(0, 1) for x in truth(b, heads))
            some = q[rows][:, self._q_heads].transpose(0, 1)
            exact = _exact(some, k, v)
            known = {Precision.BF16: _bf16(some, k, v) - exact, Precision.FP8: _fp8(some, k, v) - exact}
            self._samples.append((rows, exact, known))

    def check(self, out: torch.Tensor, precision: Precision = Precision.BF16) -> Gate:
        """Verdict on ``[total_q, q_heads, head_dim]``: worst of largest and root mean square error."""
        if precision is Precision.EITHER:
            plain = self.check(out, Precision.BF16)
            return plain if plain.passed else self.check(out, Precision.FP8)
        worst = Gate(True, 0.0, float("inf"), "")
        for rows, exact, known in self._samples:
            got = out[rows][:, self._q_heads].transpose(0, 1).double()
            floor = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
            for norm in (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt()):
                error, allowed = float(norm(got - exact)), FACTOR * float(norm(known[precision])) + floor
                verdict = Gate(error <= allowed, error, allowed, f"float64, {precision.value} tolerance")
                if not verdict.passed or error / allowed >= worst.error / worst.allowed:
                    worst = verdict
                if not worst.passed:
                    return worst
        return worst


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.double() @ k.double().transpose(1, 2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ v.double()


def _bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.bfloat16()[None] for x in (q, k, v)))[0].double()


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax((1, 2), keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _fp8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (_e4m3(x.float()) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = (weights * WEIGHT_SCALE).to(torch.float8_e4m3fn).float() / WEIGHT_SCALE
    return (rounded @ v / weights.sum(-1, keepdim=True)).double()
