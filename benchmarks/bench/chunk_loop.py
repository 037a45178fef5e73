"""The chunk loop of Wan 1.3B: real layer shapes, random weights, a history that moves on.

A chunk is four denoising passes and the clean one over 3 frames that attend to 18 frames and themselves. Quantised,
the manager reserves, attends with RoPE on read, encodes the span that closes, commits and evicts what left the
window; the clean pass tells which layers are final, so that they are encoded beside the rest of it. The baseline
keeps rotated BF16 keys in a ring that costs nothing to maintain, and attends by cuDNN.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch.nn.attention import SDPBackend

from bench.attention import PATHS, path_check
from bench.dense_baselines import sdpa
from bench.gate import AttentionGate
from bench.history import random_tokens, thousands, video_grid
from bench.roofline import Work
from bench.rows import Case, Gate, System
from bench.settings import Bench
from qvg_paged import CacheConfig, Chunk, KVCacheManager, ModelSpec, RoPESpec, Stream, Window
from qvg_paged.kernels import AttentionPath

__all__ = ["DENSE_HISTORY", "chunk_loop_cases"]

DENSE_HISTORY = "BF16 history"
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class WanShape:
    """Sizes of the model and its loop; the defaults are Wan 1.3B's at 480p.

    Attributes:
        layers, heads, head_dim, ffn: of the model.
        text: tokens of the prompt that cross-attention reads.
        tokens: of a frame.
        chunk, history: frames.
        passes: over a chunk, the clean one included.
        memory: of the manager.
    """

    layers: int = 30
    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    text: int = 512
    tokens: int = 1560
    chunk: int = 3
    history: int = 18
    passes: int = 5
    memory: str = "16GiB"

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def rope(self) -> RoPESpec:
        """Of queries and keys."""
        return RoPESpec(head_dim=self.head_dim, grid=video_grid(self.tokens))

    def work(self) -> Work:
        """Products of all layers and passes; weights and BF16 history are read in each."""
        queries, keys = self.chunk * self.tokens, (self.history + self.chunk) * self.tokens
        weights = 6 * self.dim**2 + 2 * self.dim * self.ffn
        flops = 2 * queries * weights + 4 * queries * (keys + self.text) * self.dim
        return Work(
            float(self.passes * self.layers * flops), self.passes * self.layers * 2.0 * (weights + 2 * keys * self.dim)
        )


class WanModel:
    """A stack of blocks with random weights; attention to the history is the caller's."""

    def __init__(self, shape: WanShape, device: torch.device) -> None:
        self.shape = shape
        size = shape.dim

        def weight(*sizes: int) -> torch.Tensor:
            return (torch.randn(sizes, device=device) / sizes[-1] ** 0.5).bfloat16()

        self.blocks = [
            {
                **{name: weight(size, size) for name in ("q", "k", "v", "o", "cross_q", "cross_o")},
                "up": weight(shape.ffn, size), "down": weight(size, shape.ffn), "modulation": weight(6, size) / 8,
                "text": weight(2, 1, shape.heads, shape.text, shape.head_dim),
            }
            for _ in range(shape.layers)
        ]  # fmt: skip
        self.x = torch.randn(shape.chunk * shape.tokens, size, device=device).bfloat16()

    def projected(self, layer: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Queries, keys (both normalised, not rotated) and values of a layer, ``[tokens, heads, head_dim]``."""
        w = self.blocks[layer]
        x = self._modulated(x, w["modulation"][0], w["modulation"][1])
        q, k = (F.rms_norm(F.linear(x, w[name]), x.shape[-1:]) for name in "qk")
        return [y.unflatten(-1, (self.shape.heads, -1)) for y in (q, k, F.linear(x, w["v"]))]

    @staticmethod
    def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)

    def run(self, attend: Attend) -> torch.Tensor:
        """One pass over the chunk."""
        x = self.x
        for layer, w in enumerate(self.blocks):
            attended = attend(layer, *self.projected(layer, x)).flatten(1)
            x = torch.addcmul(x, F.linear(attended, w["o"]), w["modulation"][2])
            q = F.rms_norm(F.linear(F.layer_norm(x, x.shape[-1:]), w["cross_q"]), x.shape[-1:])
            q = q.unflatten(-1, (self.shape.heads, -1)).transpose(0, 1)[None]
            crossed = F.scaled_dot_product_attention(q, *w["text"])[0].transpose(0, 1).flatten(1)
            x = x + F.linear(crossed, w["cross_o"])
            hidden = F.gelu(F.linear(self._modulated(x, *w["modulation"][3:5]), w["up"]), approximate="tanh")
            x = torch.addcmul(x, F.linear(hidden, w["down"]), w["modulation"][5])
        return x


def chunk_loop_cases(bench: Bench) -> Iterator[Case]:
    """One row."""
    shape = WanShape()
    if bench.is_small:
        shape = WanShape(
            layers=2, heads=2, head_dim=64, ffn=256, text=16, tokens=64, history=6, passes=2, memory="64MiB"
        )
    history = thousands(shape.history * shape.tokens)
    name = f"chunk loop of {shape.layers} layers, {shape.dim} channels, {history} tokens of history"
    yield Case("attention", name, vars(shape), lambda: _systems(bench, shape), DENSE_HISTORY, ("chunk loop",))


def _systems(bench: Bench, shape: WanShape) -> Iterator[System]:
    bench.drop_history()
    model = WanModel(shape, bench.device)
    yield System(DENSE_HISTORY, _dense_loop(bench, model), shape.work())
    stream = _filled_stream(bench, shape)
    for name, path in PATHS.items():
        if path is AttentionPath.DIRECT or (bench.is_small and path is not AttentionPath.AUTO):
            continue
        manager = stream.manager
        manager.config = replace(manager.config, path=path)
        yield System(name, _quantised_loop(model, stream), shape.work(), _check(model, stream, path), ours=True)


def _dense_loop(bench: Bench, model: WanModel) -> Callable[[int], torch.Tensor]:
    shape = model.shape
    keys, chunk = (shape.history + shape.chunk) * shape.tokens, shape.chunk * shape.tokens
    ring = torch.zeros(shape.layers, 2, 1, shape.heads, keys, shape.head_dim, dtype=torch.bfloat16, device=bench.device)
    for layer in ring:
        for part in layer:
            part[0].copy_(random_tokens(keys, shape.heads, shape.head_dim, bench.device).transpose(0, 1))
    rotated = _rotation(shape, bench.device)
    backend = None if bench.is_small else SDPBackend.CUDNN_ATTENTION

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cached = ring[layer]
        for part, new in zip(cached, (rotated(k), v), strict=True):
            part[0, :, -chunk:].copy_(new.transpose(0, 1))
        return sdpa(backend, rotated(q).transpose(0, 1)[None], *cached)[0].transpose(0, 1)

    def run(_: int) -> torch.Tensor:
        for _ in range(shape.passes):
            x = model.run(attend)
        return x

    return run


def _rotation(shape: WanShape, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns ``[tokens, heads, head_dim]`` of a chunk; as complex products, in float32."""
    cos, sin = shape.rope.tables(range(shape.history, shape.history + shape.chunk), device).expand()
    factor = torch.complex(cos, sin)[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * factor).flatten(-2).to(x.dtype)

    return rotated


def _filled_stream(bench: Bench, shape: WanShape) -> Stream:
    model = ModelSpec(
        num_layers=shape.layers, num_kv_heads=shape.heads, head_dim=shape.head_dim, tokens_per_frame=shape.tokens,
        frames_per_chunk=shape.chunk, rope="on_read", rope_spec=shape.rope,
    )  # fmt: skip
    config = CacheConfig(memory=shape.memory, span_frames=shape.chunk, device=bench.device)
    stream = KVCacheManager(model, config).open("bench", window=Window(recent_frames=shape.history))
    size = (shape.chunk * shape.tokens, shape.heads, shape.head_dim)
    while stream.committed < shape.history:
        with stream.begin_chunk() as chunk:
            for layer in range(shape.layers):
                chunk.write(layer, random_tokens(*size, bench.device), random_tokens(*size, bench.device))
            chunk.commit()
    return stream


def _quantised_loop(model: WanModel, stream: Stream) -> Callable[[int], torch.Tensor]:
    rotated = _rotation(model.shape, stream.manager.device)

    def run(_: int) -> torch.Tensor:
        with stream.begin_chunk() as chunk:

            def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return chunk.attend(layer, rotated(q), k, v)

            def attend_last(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                out = attend(layer, q, k, v)
                chunk.seal(layer)
                return out

            for _ in range(model.shape.passes - 1):
                model.run(attend)
            x = model.run(attend_last)
            chunk.commit()
        return x

    return run


def _check(model: WanModel, stream: Stream, path: AttentionPath) -> Callable[[torch.Tensor], Gate]:
    """Attention of the first layer on the way the loop takes it, and a finite result."""

    def check(x: torch.Tensor) -> Gate:
        if not bool(x.isfinite().all()):
            return Gate(False, float("nan"), 0.0, "finite numbers")
        q, k, v = model.projected(0, model.x)
        with stream.begin_chunk() as chunk:
            out = chunk.attend(0, q, k, v)
            keys, values = _visible(stream, chunk, k, v)
        cu = (0, len(q))
        gate = AttentionGate(q, cu, q.shape[1], lambda _, heads: (keys[:, heads], values[:, heads]))
        return path_check(gate, path)(out)

    return check


def _visible(stream: Stream, chunk: Chunk, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K (rotated) and V the chunk attends to, float32."""
    spec = stream.manager.model.read_rope
    assert spec is not None
    old_k, old_v = stream.read(0, chunk.visible, torch.float32)
    keys = spec.rotate(torch.cat([old_k, k.float()]), [*chunk.visible, *chunk.frames])
    return keys, torch.cat([old_v, v.float()])
