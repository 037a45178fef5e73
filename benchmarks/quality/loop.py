"""The world model generating from caches whose closed spans are replaced by what a codec makes of them.

All rows (codecs) and all paths share one batch, so that many formats cost little more than one. Attention is dense:
what is judged is what a codec does to the numbers, and the paged paths read the same numbers (`tests/test_quality.py`).
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from world_model.model import WorldModel, rotate
from world_model.sampling import noise_levels

from quality.codecs import DenseSpan, Memory, SpanCodec
from quality.correction import error_columns
from quality.paths import Paths

__all__ = ["Cache", "CodedHistory", "decoded", "generate", "prefill"]


LAYERS_AT_ONCE = 4
"""Layers coded together: more cost memory, fewer cost launches."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which plans anew for every length of the history."""


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One cache under test.

    Attributes:
        key, value: codecs of closed spans.
        dense_first: first frames that stay unquantised.
        dense_recent: newest closed frames that stay unquantised.
        window: newest frames that stay visible; None for all.
        correction: multiple of the expected excess of quantised logits that is subtracted from them.
        correction_pairs: RoPE pairs of each half of the channels in which the excess is looked for: those where the
            queries meet the largest errors.
        noise: offset to the seed of the sampling noise.
    """

    key: SpanCodec = field(default_factory=DenseSpan)
    value: SpanCodec = field(default_factory=DenseSpan)
    dense_first: int = 0
    dense_recent: int = 0
    window: int | None = None
    correction: float = 0.0
    correction_pairs: int = 32
    noise: int = 0


class CodedHistory:
    """K and V of all rows and paths, one frame per chunk; a `world_model.sampling.History`.

    The batch is rows times paths, paths fastest. Rows share `window`. Keys before RoPE are held as long as their span
    is open, or, with `keep`, for good.
    """

    def __init__(
        self,
        model: WorldModel,
        caches: Sequence[Cache],
        paths: int,
        frames: int,
        span_frames: int,
        *,
        watched: Sequence[int] = (),
        keep: bool = False,
    ) -> None:
        config, device = model.config, model.inp.weight.device
        self.caches, self.paths, self.frames, self.span_frames = list(caches), paths, frames, span_frames
        self.window, self.tokens, self.committed = caches[0].window, config.tokens_per_frame, 0
        self.layers, self.heads, self.dim = config.layers, config.heads, config.head_dim
        self.coded = [0] * len(caches)
        self.extra = 8 if any(cache.correction for cache in caches) else 0
        self.ring = (
            frames if keep else span_frames * -(-(span_frames + max(c.dense_recent for c in caches)) // span_frames)
        )
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        batch = len(caches) * paths
        empty = partial(torch.zeros, device=device, dtype=self.dtype)
        self.keys = empty((self.layers, batch, self.ring * self.tokens, self.heads, self.dim))
        self.values = empty((self.layers, batch, frames * self.tokens, self.heads, self.dim + self.extra))
        self.rotated = torch.zeros_like(self.values)
        self.watched, self.queries = frozenset(watched), dict[tuple[int, int], Tensor]()
        self.clean = False
        self.weights: dict[tuple[int, int], Tensor] = {}
        self._cos, self._sin = model.rope_tables(0, frames)
        self.moments: Tensor | None = None
        if keep or self.extra or any(cache.key.uses_queries for cache in caches):
            self.moments = torch.zeros((self.layers, batch, self.heads, self.dim, self.dim), device=device)
        self._outputs = _output_metric(model) if keep or any(cache.value.uses_queries for cache in caches) else None
        self._generator = torch.Generator().manual_seed(0)
        self._memories: dict[tuple[int, str], dict[int, Memory]] = {}

    def begin_chunk(self) -> "CodedHistory":
        """The history is its own chunk."""
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Overwrite the frame in progress with `k`, `v` and attend to it and the visible history."""
        new = self._slice(self.committed, self.committed + 1)
        self.keys[layer][:, self._slice(self.committed % self.ring, self.committed % self.ring + 1)] = k
        self.values[layer][:, new, :, : self.dim] = v
        self.rotated[layer][:, new, :, : self.dim] = self.turned(k, new)
        if self.clean:
            self._see(layer, q)
        first = 0 if self.window is None else max(0, self.committed - self.window)
        visible = slice(first * self.tokens, new.stop)
        keys, values = (plane[layer][:, visible].transpose(1, 2) for plane in (self.rotated, self.values))
        asked = self._corrected(layer, q) if self.extra else q
        asked = asked.to(keys.dtype).transpose(1, 2)
        with sdpa_kernel(ATTENTION):
            out = functional.scaled_dot_product_attention(asked, keys, values, scale=self.dim**-0.5)
        return out.transpose(1, 2)[..., : self.dim].to(q.dtype)

    def commit(self) -> None:
        """Freeze the frame in progress and code the spans that are due; none after the last frame."""
        self.committed += 1
        with torch.autocast(self.keys.device.type, enabled=False):
            self._code_due()

    def _code_due(self) -> None:
        for row, cache in enumerate(self.caches):
            due = (self.coded[row] + 1) * self.span_frames + cache.dense_recent
            if due <= self.committed < self.frames:
                self._code(row, self.coded[row])
                self.coded[row] += 1

    def moment(self, mine: slice) -> Tensor | None:
        """Second moment of the queries of some of the batch, ``[layers * batch * heads, dim, dim]``."""
        return None if self.moments is None else self.moments[:, mine].flatten(0, 2)

    def outputs(self) -> Tensor | None:
        """What follows attention sees of the values' channels, as `moment` for the values of one row."""
        metric = self._outputs
        return None if metric is None else metric[:, None].expand(-1, self.paths, -1, -1, -1).flatten(0, 2)

    def trim(self, frames: int) -> None:
        """Forget K and V of all but the first `frames` frames, and what attention read; nothing can be added then."""
        held = self._slice(0, frames)
        self.keys, self.values = self.keys[:, :, held].clone(), self.values[:, :, held].clone()
        self.rotated = self.rotated[:, :, :0].clone()

    def first(self, paths: int) -> "CodedHistory":
        """The same of the first `paths` paths, of a history with one row; the tensors are shared."""
        some = copy(self)
        some.paths, some.queries = paths, {place: q[:paths] for place, q in self.queries.items()}
        some.keys, some.values, some.rotated = self.keys[:, :paths], self.values[:, :paths], self.rotated[:, :paths]
        some.moments = None if self.moments is None else self.moments[:, :paths]
        return some

    def turned(self, keys: Tensor, tokens: slice) -> Tensor:
        """`keys` ``[batch, tokens, heads, dim]`` rotated to the positions of `tokens`."""
        return rotate(keys, self._cos[:, tokens], self._sin[:, tokens])

    def _slice(self, first: int, last: int) -> slice:
        return slice(first * self.tokens, last * self.tokens)

    def _code(self, row: int, span: int) -> None:
        cache, mine = self.caches[row], slice(row * self.paths, (row + 1) * self.paths)
        first, last = max(span * self.span_frames, cache.dense_first), (span + 1) * self.span_frames
        if first >= last:
            return
        some, held = self._slice(first, last), self._slice(first % self.ring, (last - 1) % self.ring + 1)
        of_key, of_value = (self._memories.setdefault((row, part), {}) for part in ("key", "value"))
        keys = decoded(cache.key, self.keys[:, mine, held], self.moment(mine), of_key)
        values = decoded(cache.value, self.values[:, mine, some, :, : self.dim], self.outputs(), of_value)
        for layer in range(self.layers):
            self.rotated[layer][mine, some, :, : self.dim] = self.turned(keys[layer], some)
        self.values[:, mine, some, :, : self.dim] = values
        if cache.correction:
            self._mark(row, span, some, keys.float() - self.keys[:, mine, held].float())

    def _see(self, layer: int, q: Tensor) -> None:
        """Second moment of the clean queries as keys before RoPE see them: turned back by a random visible token."""
        if self.committed in self.watched:
            self.queries[layer, self.committed] = q[: self.paths].clone()
        if self.moments is not None:
            seen = torch.randint((self.committed + 1) * self.tokens, (self.tokens,), generator=self._generator)
            seen = seen.to(q.device)
            turned = rotate(q, self._cos[:, seen], -self._sin[:, seen]).transpose(1, 2)
            self.moments[layer] += (turned.transpose(-1, -2) @ turned).float()

    def _mark(self, row: int, span: int, some: slice, error: Tensor) -> None:
        """Columns of keys with the squared error of each half of the channels, weighted as the span's errors are."""
        assert self.moments is not None
        mine = slice(row * self.paths, (row + 1) * self.paths)
        size = self.moments[:, mine].diagonal(dim1=-2, dim2=-1)
        energy, weight = error_columns(error, size, self.caches[row].correction_pairs)
        slot = 2 * (span % (self.extra // 2))
        self.rotated[:, mine, some, :, self.dim + slot : self.dim + slot + 2] = -energy.to(self.dtype)
        self.weights[row, slot] = weight

    def _corrected(self, layer: int, q: Tensor) -> Tensor:
        """Queries with a column per span and half: what makes of the keys' columns the expected excess of a logit."""
        columns = q.new_zeros((*q.shape[:-1], self.extra))
        for (row, slot), weight in self.weights.items():
            mine = slice(row * self.paths, (row + 1) * self.paths)
            energy = (q[mine].float().unflatten(-1, (2, -1)).square() * weight[layer]).sum(-1)
            half = self.caches[row].correction * 0.5 * self.dim**-0.5
            columns[mine, :, :, slot : slot + 2] = (half * energy).to(q.dtype)
        return torch.cat([q, columns], -1)


def _output_metric(model: WorldModel) -> Tensor:
    """``W^T W`` of the output projection's columns of every head, ``[layers, heads, dim, dim]``."""
    weights = torch.stack([block.o.weight for block in model.blocks])  # type: ignore[union-attr]
    columns = weights.detach().float().unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
    return columns.transpose(-1, -2) @ columns


def decoded(
    codec: SpanCodec, x: Tensor, moment: Tensor | None, memories: dict[int, Memory] | None = None
) -> Tensor:
    """`x` ``[layers, paths, tokens, heads, dim]`` coded and decoded, every head of every layer by itself.

    `moment` is `CodedHistory.moment` for keys, `CodedHistory.outputs` for values; `memories` goes from span to span.
    """
    layers, paths, tokens, heads, dim = x.shape
    out = torch.empty_like(x)
    for first in range(0, layers, LAYERS_AT_ONCE):
        some = x[first : first + LAYERS_AT_ONCE]
        rows = slice(first * paths * heads, (first + len(some)) * paths * heads)
        mine = moment[rows] if codec.uses_queries and moment is not None else None
        memory = None if memories is None else memories.setdefault(first, {})
        coded = codec.code(some.transpose(2, 3).reshape(-1, tokens, dim), mine, memory)
        out[first : first + len(some)] = coded.to(x.dtype).view(-1, paths, heads, tokens, dim).transpose(2, 3)
    return out


@torch.no_grad()
def generate(model: WorldModel, paths: Paths, history: CodedHistory, *, steps: int = 4, shift: float = 3.0) -> Tensor:
    """Fill the cache with the given frames and generate the rest: ``[rows, paths, generated, 3, height, width]``."""
    device, rows = paths.frames.device, len(history.caches)
    levels = noise_levels(steps, shift)
    prefill(model, paths, history, slice(0, len(paths)))
    video = []
    with _autocast(device):
        for frame in range(paths.given, paths.poses.shape[1]):
            x = torch.cat([paths.noise(frame, cache.noise) for cache in history.caches])[:, None].to(device)
            for level, next_level in pairwise(levels):
                clean = _forward(model, paths.poses, history, x, level, frame)
                x = clean + (x - clean) * (next_level / level)
            x = x.clamp(-1, 1)
            video.append(x.view(rows, len(paths), *x.shape[2:]))
            _forward(model, paths.poses, history, x, 0.0, frame)
            history.commit()
    return torch.stack(video, 2)


@torch.no_grad()
def prefill(model: WorldModel, paths: Paths, history: CodedHistory, some: slice) -> None:
    """A clean pass for every given frame of some paths."""
    rows, poses = len(history.caches), paths.poses[some]
    with _autocast(paths.frames.device):
        for frame in range(paths.given):
            x = paths.frames[some, frame : frame + 1].repeat(rows, 1, 1, 1, 1)
            _forward(model, poses, history, x, 0.0, frame)
            history.commit()


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _forward(model: WorldModel, poses: Tensor, history: CodedHistory, x: Tensor, level: float, frame: int) -> Tensor:
    rows = len(history.caches)
    pose, reference = poses[:, frame : frame + 1].repeat(rows, 1, 1), poses[:, :1].repeat(rows, 1, 1)
    t = torch.full((len(x), 1), level, device=x.device)
    history.clean = level == 0.0
    clean: Tensor = model(x, t, pose, reference, frame, history.attend)
    return clean.float()
