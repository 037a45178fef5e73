"""Candidates for a better 2-bit format, each switch by itself: what was tried before the presets were chosen.

The kept ones are options of `qvg_paged.Codec`; the others live here only, so that their numbers can be measured again.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quality.codecs import Memory, asymmetric, hadamard
from quality.components import components, low_rank
from quality.grids import EXACT, LEVELS, WIDTH, fp8, leading, nearest, pair_size, searched, spread_of
from qvg_paged.kernels import _blocks
from qvg_paged.kernels.backend import Backend, uses_triton
from qvg_paged.kernels.codec import decode_span, encode_span
from qvg_paged.kernels.formats import CentroidType, Codec, ScaleRule
from qvg_paged.kernels.kmeans import Centroids, fit, round_centroids, seed_rows

__all__ = ["Candidate"]

@dataclass(frozen=True)
class Candidate:
    """A codec with every idea as a switch.

    Attributes:
        levels: key of `LEVELS`, "asym2" (min-max, FP8 scale and zero point), or "2+2": four levels and a second plane
            that refines them ("2+2 dropped": the same without its second plane).
        rule: "absmax", "least-squares", "search", or "energy" (search, then the scale that keeps the block's energy).
        block: numbers that share a scale.
        axis: "channel" (blocks along channels) or "token" (along tokens, one channel each).
        balance: "none", "pair", "channel", "head" (one factor), "query" (keys: root of spread over query size).
        balance_late: balance the residual after clustering instead of the tensor before it.
        residual: balance the residual by its own spread, which `balance` then does for clustering only: "pair",
            "channel", or "none" for `balance` throughout.
        centroids: per stage and head, 0 for none.
        stages: smoothing stages.
        centroid_bits: 16, or 8 (FP8 with a scale per head).
        centroid_integers: eight-bit integers with a scale per head instead of FP8.
        warm: k-means starts from the centroids of the span before; `iterations` is then that of later spans, the
            first has ten.
        mean: subtract the mean first (with `rank`).
        rank: principal components kept besides the mean, in place of or beside centroids.
        rank_bits: bits of their coefficients (absmax per token); with `residual` always two, on the grid of the
            residual with a scale of their own per token, and mean and components are stored in eight bits.
        nearest: centroids among which the one with the least quantisation error is taken (1: the nearest).
        query_distance: distances to centroids weighted by the queries' size in each RoPE pair.
        feedback: strength of rounding that pushes a key's error out of the queries' directions (0: none).
        compensate: directions of the queries in which the key's error is stored in eight bits.
        rotated: Hadamard transform around the residual grid.
        iterations: of Lloyd's algorithm.
    """

    levels: str = "3113"
    rule: str = "search"
    block: int = 64
    axis: str = "channel"
    balance: str = "none"
    balance_late: bool = False
    residual: str = "none"
    centroids: int = 8
    stages: int = 1
    centroid_bits: int = 16
    centroid_integers: bool = False
    warm: bool = False
    mean: bool = False
    rank: int = 0
    rank_bits: int = 4
    nearest: int = 1
    query_distance: bool = False
    feedback: float = 0.0
    compensate: int = 0
    rotated: bool = False
    iterations: int = 10

    @property
    def uses_queries(self) -> bool:
        """Whether any switch asks for the queries."""
        return bool(self.query_distance or self.feedback or self.compensate or self.balance == "query")

    def centroids_for(self, tokens: int) -> int:  # noqa: ARG002 - the same whatever the span
        """As given."""
        return self.centroids

    def with_centroids(self, count: int) -> "Candidate":
        """The same codec with another number of centroids."""
        return replace(self, centroids=count)

    def code(self, x: Tensor, moment: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """`x` ``[heads, tokens, dim]`` as it reads after coding, float32."""
        if self.residual != "none":
            return self._code_residual(x, moment)
        balance = self._balance(x.float(), moment)
        y = x if self.balance_late else (x.float() / balance).to(x.dtype)
        base = torch.zeros_like(y, dtype=torch.float32)
        if self.mean or self.rank:
            base = base + y.float().mean(1, keepdim=True).bfloat16().float()
        if self.rank:
            base = base + low_rank(y.float() - base, self.rank, self.rank_bits)
        for stage in range(self.stages if self.centroids else 0):
            base = base + self._smooth(y, base, stage, balance, moment, memory)
        residual = (y.float() - base).to(x.dtype).float()
        if self.balance_late:
            residual = residual / balance
        grid = self._shaped(residual, balance, moment) if self.feedback else self._grid(residual)
        out = base + (grid * balance if self.balance_late else grid)
        out = out if self.balance_late else out * balance
        return out + self._compensation(x.float() - out, moment) if self.compensate else out

    def _code_residual(self, x: Tensor, moment: Tensor | None) -> Tensor:
        """Centroids found with one balance, stored with another: that of what they leave."""
        wide, before = x.float(), self._balance(x.float(), moment)
        if self.rank:
            base = components(wide / before, self.rank) * before
        else:
            base = self._smooth((wide / before).to(x.dtype), wide.new_zeros(1), 0, before, moment, None) * before
        balance = spread_of(wide - base, self.residual == "pair").clamp_min(1e-6).bfloat16().float()
        base = base / balance if self.rank else round_centroids(base / balance, CentroidType.FP8).values.float()
        residual = wide / balance - base
        grid = self._shaped(residual, balance, moment) if self.feedback else self._grid(residual)
        return (base + grid) * balance

    def bits(self, tokens: int, dim: int) -> float:
        """Codes, scales, ids, codebooks, balancing, means, components and coefficients."""
        scales = 16 if self.levels == "asym2" else 8
        length = tokens if self.axis == "token" else dim
        total = WIDTH[self.levels] + scales / min(self.block, length)
        if self.rank and self.residual != "none":
            return total + (2 * self.rank + 8) / dim + (8 * (self.rank + 1) + 16) / tokens
        if self.centroids:
            total += self.stages * (8 / dim + self.centroids * self.centroid_bits / tokens)
        balanced = self.residual != "none" or self.balance != "none"
        total += 16 / tokens * (balanced + (self.mean or self.rank > 0) + self.rank)
        total += (self.rank * self.rank_bits + 8) / dim if self.rank else 0
        return total + 8 * self.compensate / dim

    def _balance(self, x: Tensor, moment: Tensor | None) -> Tensor:
        if self.balance == "none":
            return x.new_ones(1)
        if self.balance == "head":
            spread = x.var(1, keepdim=True, correction=0).mean(-1, keepdim=True).sqrt()
        else:
            spread = spread_of(x, self.balance != "channel")
        if self.balance == "query":
            assert moment is not None
            spread = (spread / pair_size(moment)).sqrt()
        elif self.balance == "root":
            spread = spread.sqrt()
        elif self.balance == "clip":
            spread = torch.maximum(spread, spread.median(-1, keepdim=True).values)
        elif self.balance == "cap":
            spread = (spread / (4 * spread.median(-1, keepdim=True).values)).clamp_min(1.0)
        elif self.balance.startswith("knee"):
            middle = spread.median(-1, keepdim=True).values
            spread = torch.maximum((spread * middle).sqrt(), spread / float(self.balance[4:]) ** 0.5)
        return spread.clamp_min(1e-6).bfloat16().float()

    def _smooth(
        self, y: Tensor, base: Tensor, stage: int, balance: Tensor, moment: Tensor | None, memory: Memory | None
    ) -> Tensor:
        """The chosen centroid of every token."""
        rest = (y.float() - base).to(y.dtype)
        heads, tokens, _ = rest.shape
        weight = rest.new_ones(1, dtype=torch.float32)
        if self.query_distance:
            assert moment is not None
            weight = pair_size(moment) * (1.0 if self.balance_late else balance)
            weight = (weight / weight.square().mean(-1, keepdim=True).sqrt()).clamp(0.1, 10.0)
        seen = (rest.float() * weight).to(rest.dtype).contiguous()
        before = memory.get(f"centroids {stage}") if self.warm and memory is not None else None
        if before is None:
            rows = seed_rows(tokens, heads, self.centroids, 1234 + stage).to(rest.device)
            start = seen[torch.arange(heads, device=rest.device)[:, None], rows].float()
        else:
            start = before / balance
        ids = torch.empty((heads, tokens), dtype=torch.uint8, device=rest.device)
        kind = CentroidType.FP8 if self.centroid_bits == 8 and not self.centroid_integers else CentroidType.BF16
        triton = uses_triton(Backend.AUTO, rest.device)
        iterations = 10 if self.warm and before is None else self.iterations
        found = fit(seen, start, ids, iterations=iterations, kind=kind, triton=triton)
        values = found.values.float() / weight
        if self.warm and memory is not None:
            memory[f"centroids {stage}"] = values * balance
        if self.query_distance:
            values = round_centroids(values, kind).values.float()
        if self.centroid_integers:
            step = values.abs().amax((1, 2), keepdim=True).clamp_min(1e-20) / 127
            values = (values / step).round_() * step
        if self.nearest > 1:
            ids = self._least_error(rest.float(), seen, found, values)
        return torch.gather(values, 1, ids.long()[..., None].expand_as(rest))

    def _least_error(self, rest: Tensor, seen: Tensor, found: Centroids, values: Tensor) -> Tensor:
        distance = torch.cdist(seen.float(), found.values.float())
        near = distance.topk(min(self.nearest, self.centroids), largest=False).indices
        best, best_error = near[..., 0], torch.full(rest.shape[:2], torch.inf, device=rest.device)
        for place in range(near.shape[-1]):
            residual = rest - torch.gather(values, 1, near[..., place, None].expand_as(rest))
            error = (residual - self._grid(residual)).square().sum(-1)
            better = error < best_error
            best = torch.where(better, near[..., place], best)
            best_error = torch.where(better, error, best_error)
        return best

    def _grid(self, residual: Tensor) -> Tensor:
        if self.rotated:
            residual = hadamard(residual)
        if self.axis == "token":
            out = self._blocks(residual.transpose(1, 2).contiguous()).transpose(1, 2)
        else:
            out = self._blocks(residual)
        return hadamard(out) if self.rotated else out

    def _blocks(self, x: Tensor) -> Tensor:
        if self.levels == "asym2":
            return asymmetric(x, self.block, 4, fp8=True)
        blocks = x.unflatten(-1, (-1, min(self.block, x.shape[-1])))
        if self.levels in EXACT and self.rule != "energy" and x.shape[-1] <= 256:
            codec = Codec(grid=EXACT[self.levels], stages=0, block_size=self.block, scale_rule=ScaleRule(self.rule))
            return decode_span(encode_span(x.transpose(0, 1), codec), torch.float32).transpose(0, 1)
        return self._round(blocks, self._scale(blocks)).flatten(-2)

    def _round(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """`blocks` on the grid with the given scales ``[..., 1]``."""
        if self.levels == "2+2":
            return nearest(blocks, scale / 4, LEVELS["16"])
        levels = LEVELS["3113" if self.levels == "2+2 dropped" else self.levels]
        return nearest(blocks, scale, levels)

    def _scale(self, blocks: Tensor) -> Tensor:
        grid = LEVELS["3113" if self.levels.startswith("2+2") else self.levels]
        table = _blocks.fp8_values(blocks.device)
        name = "3113" if self.levels.startswith("2+2") else self.levels
        if name in EXACT and self.rule != "energy":
            codec = Codec(grid=EXACT[name], block_size=blocks.shape[-1], scale_rule=ScaleRule(self.rule))
            bytes_, _ = _blocks.quantise_blocks(blocks.contiguous(), codec)
            return table[bytes_.int()][..., None]
        best = fp8(blocks.abs().amax(-1, keepdim=True) / grid[-1])
        if self.rule in {"search", "energy"}:
            best = searched(blocks, grid)
        if self.rule == "energy":
            level = nearest(blocks, best, grid)
            energy = level.square().sum(-1, keepdim=True).clamp_min(1e-20)
            best = fp8(best * (blocks.square().sum(-1, keepdim=True) / energy).sqrt())
        return best

    def _shaped(self, residual: Tensor, balance: Tensor, moment: Tensor | None) -> Tensor:
        """Codes one channel after the other; each error is carried to the channels that the queries see alike."""
        assert moment is not None
        dim = residual.shape[-1]
        seen = moment * balance.transpose(1, 2) * balance if balance.ndim > 1 else moment
        size = seen.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        eye = torch.eye(dim, device=seen.device)
        metric = (self.feedback * seen / size.clamp_min(1e-20) + eye).double()
        # inverse(metric) = upper.T @ upper, from the Cholesky factor of the metric in reverse order
        lower = torch.linalg.cholesky(metric.flip(1, 2)).flip(1, 2)
        upper = torch.linalg.solve_triangular(lower, eye.double().expand_as(lower), upper=True).float()
        scale = self._scale(residual.unflatten(-1, (-1, self.block)))
        scale = scale.expand(*scale.shape[:-1], self.block).flatten(-2)
        rest, out = residual.clone(), torch.empty_like(residual)
        for channel in range(dim):
            one = slice(channel, channel + 1)
            out[..., one] = self._round(rest[..., one], scale[..., one])
            error = (rest[..., one] - out[..., one]) / upper[:, one, one]
            rest[..., channel + 1 :] -= error * upper[:, one, channel + 1 :]
        return out

    def _compensation(self, error: Tensor, moment: Tensor | None) -> Tensor:
        assert moment is not None
        basis = leading(moment, self.compensate).bfloat16().float()
        part = error @ basis
        scale = part.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        return ((part / scale).round_() * scale) @ basis.transpose(1, 2)
