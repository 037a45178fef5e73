"""Muon: momentum whose matrix is replaced by the nearest orthogonal one before it is applied.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". Only for weight matrices inside the
network; embeddings, norms, biases and the output layer belong to AdamW.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the paper's quintic: singular values in (0, 1] land in about [0.7, 1.2] after five rounds."""


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Approximate U V^T of each matrix's singular value decomposition U S V^T, by Newton-Schulz.

    `matrices`: ``[count, rows, columns]`` with rows <= columns. The result has the same shape; BF16 on CUDA, where the
    method was made to live with it, and float32 elsewhere.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, all matrices of a shape in one batched product.

    Args:
        params: 2-D parameters.
        lr: spectral norm of an update (times ``sqrt(rows / columns)`` for tall matrices).
        momentum: of the gradient average.
        weight_decay: decoupled, times lr.

    A matrix of 3d rows and d columns is taken as three stacked square ones: the joint q, k, v projection.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        gradients = [p.grad for p in params]
        averages = [self.state[p].setdefault("average", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
        batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, direction in zip(params, ahead, strict=True):
            rows, columns = param.shape
            pieces = 3 if rows == 3 * columns else 1
            for weight, part in zip(param.chunk(pieces), direction.chunk(pieces), strict=True):
                batches[(min(part.shape), max(part.shape))].append((weight, part))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        for pairs in batches.values():
            wide = torch.stack([part if part.shape[0] <= part.shape[1] else part.mT for _, part in pairs])
            for (weight, _), update in zip(pairs, orthogonalize(wide).unbind(), strict=True):
                tall = max(1.0, weight.shape[0] / weight.shape[1])
                turned = update if update.shape == weight.shape else update.mT
                weight.add_(turned.to(weight.dtype), alpha=-group["lr"] * tall**0.5)
