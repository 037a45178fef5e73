"""The released Quant VideoGen code, loaded from a clone as it is and called the way its integrations call it."""

import importlib
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.rows import Gate
from qvg_paged import ArgumentError

__all__ = ["CONFIGURATIONS", "ReleasedCodec", "ReleasedHistory", "decode_gate", "load_modules"]

CENTROIDS, BLOCK, BITS = 256, 64, 2
CONFIGURATIONS = 4
"""Of each of its kernels' autotuning configurations, these many are tried: all of them take minutes a shape."""
QUANT_TYPE = "triton-nstages-kmeans-int2"


def load_modules(path: Path, names: Iterable[str], configurations: int) -> types.SimpleNamespace:
    """Modules of the package without its own imports (models, logging), under their last names.

    Args:
        path: clone of the repository.
        names: modules below ``quant_videogen``, as in ``"real.smooth"``.
        configurations: of each kernel that stay to be tuned, larger tiles first.

    Raises:
        ArgumentError: `path` is no such clone.
    """
    root = path / "quant_videogen"
    if not (root / "real" / "quant_pack.py").exists():
        raise ArgumentError(
            f"official: expected a clone of Quant VideoGen, found no {root}/real/quant_pack.py; clone it there"
        )
    import triton  # noqa: PLC0415 - only where the released code is run

    for name, folder in (("quant_videogen", root), ("quant_videogen.real", root / "real")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    for name in ("loguru", "termcolor"):
        stand_in = types.ModuleType(name)
        stand_in.logger, stand_in.colored, stand_in.cprint = types.SimpleNamespace(), str, print  # type: ignore[attr-defined]
        sys.modules.setdefault(name, stand_in)
    original = triton.autotune

    def fewer(configs: list[Any], key: list[str], **kwargs: Any) -> Callable[[Any], Any]:
        count = min(configurations, len(configs))
        kept = configs[:1] if count == 1 else [configs[-1 - i * len(configs) // count] for i in range(count)]
        # The released keys name arguments the kernels do not have, which newer Triton rejects.
        return lambda kernel: original(kept, key=[name for name in key if name in kernel.arg_names], **kwargs)(kernel)

    triton.autotune = fewer
    try:
        modules = {name.split(".")[-1]: importlib.import_module(f"quant_videogen.{name}") for name in names}
        return types.SimpleNamespace(**modules)
    finally:
        triton.autotune = original


class ReleasedCodec:
    """Its encoder and decoder with the preset of the paper: one stage, 256 centroids, blocks of 64, two bits."""

    def __init__(self, path: Path, iterations: int) -> None:
        names = ("compress", "uncompress", "sim.quant.quantize_config")
        self._code = load_modules(path, names, CONFIGURATIONS)
        self.config = self._code.quantize_config.QuantizeConfig(
            quant_type=QUANT_TYPE, num_prq_stages=1, quant_block_size=BLOCK, kmeans_max_iters=iterations,
            cache_num_k_centroids=CENTROIDS, cache_num_v_centroids=CENTROIDS,
        )  # fmt: skip
        self._bits = self._code.compress.get_quantize_fn(QUANT_TYPE, self.config)

    def encode(self, k: torch.Tensor, v: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
        """K and V ``[1, heads, tokens, head_dim]`` BF16 as it stores them."""
        made = self._code.compress.compress_kv_cache(k, v, QUANT_TYPE, self.config, self._bits)
        return self._described(made[0]), self._described(made[1])

    def _described(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "info": {"quant_config": self.config, "output_dtype": torch.bfloat16}}

    def decode(self, k: dict[str, Any], v: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[1, heads, tokens, head_dim]`` BF16."""
        found: tuple[torch.Tensor, torch.Tensor] = self._code.uncompress.uncompress_kv_cache(k, v)
        return found

    def random_state(self, tokens: int, heads: int, head_dim: int, device: torch.device) -> dict[str, Any]:
        """A state as `encode` makes it, of random codes, scales, ids and centroids."""
        shape = (1, heads, tokens)
        codes = torch.randint(0, 3, (*shape, head_dim // 4, 4), device=device)
        packed = sum(codes[..., i] << shift for i, shift in enumerate((6, 4, 2, 0)))
        assert isinstance(packed, torch.Tensor)
        scales = torch.rand((*shape, head_dim // BLOCK), device=device).to(torch.float8_e4m3fn)
        return self._described({
            "centroids_list": [torch.randn(1, heads, CENTROIDS, head_dim, device=device).bfloat16()],
            "cluster_ids_list": [torch.randint(0, CENTROIDS, shape, device=device).to(torch.uint8)],
            "residual_quant": packed.to(torch.uint8), "scales": scales, "zeros": None,
        })  # fmt: skip

    @staticmethod
    def expected(state: dict[str, Any], head: int) -> torch.Tensor:
        """What one head of a state means, ``[tokens, head_dim]`` float32."""
        packed, scales = state["residual_quant"][0, head].int(), state["scales"][0, head].float()
        shifts = torch.tensor((6, 4, 2, 0), device=packed.device)
        levels = ((packed[..., None] >> shifts) & 3).flatten(-2).float() - 1
        centroids = state["centroids_list"][0][0, head].float()[state["cluster_ids_list"][0][0, head].long()]
        return levels * scales.repeat_interleave(BLOCK, -1) + centroids


@dataclass
class ReleasedHistory:
    """Spans of K and V in its format, read as its integrations do: all of it, densely, on every call."""

    codec: ReleasedCodec
    spans: list[tuple[dict[str, Any], dict[str, Any]]]

    @classmethod
    def random(
        cls, codec: ReleasedCodec, spans: Iterable[int], heads: int, head_dim: int, device: torch.device
    ) -> "ReleasedHistory":
        """Spans of so many tokens each."""
        shapes = [(tokens, heads, head_dim, device) for tokens in spans]
        return cls(codec, [(codec.random_state(*shape), codec.random_state(*shape)) for shape in shapes])

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[1, heads, keys, head_dim]`` BF16."""
        parts = [self.codec.decode(k, v) for k, v in self.spans]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part[0] for part in parts], 2), torch.cat([part[1] for part in parts], 2)

    @property
    def nbytes(self) -> int:
        """Payload."""
        states = [state for span in self.spans for state in span]
        tensors = [
            x for s in states for x in (*s["centroids_list"], *s["cluster_ids_list"], s["residual_quant"], s["scales"])
        ]
        return sum(x.numel() * x.element_size() for x in tensors)

    def truth(self, _: int, heads: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some heads by the format's definition, ``[keys, len(heads), head_dim]`` float32."""
        k, v = (
            torch.cat([torch.stack([self.codec.expected(span[side], h) for h in heads], 1) for span in self.spans])
            for side in (0, 1)
        )
        return k, v


def decode_gate(found: torch.Tensor, state: dict[str, Any]) -> Gate:
    """A decoded state ``[1, heads, tokens, head_dim]`` BF16 against the format's definition, first head."""
    expected = ReleasedCodec.expected(state, 0)
    error = float((found[0, 0].float() - expected).abs().max())
    allowed = torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    return Gate(error <= allowed, error, allowed, "its format's definition")
