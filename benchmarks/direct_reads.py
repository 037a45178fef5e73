"""Direct reads on a GPU: checked on fresh random pages, then timed against dense attention on resident BF16.

    python benchmarks/direct_reads.py --json runs/direct_reads.json [--only decode --only few ...]

Times are medians of CUDA graph replays; every system runs the same number of calls per replay over keys that together
exceed the L2 cache. Pages hold random codes, scales and ids, so that no locality of ids helps.
"""

import argparse
import json
import math
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import results_file  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from qvg_paged.kernels.attention import AttentionPath, paged_attention  # noqa: E402
from qvg_paged.kernels.backend import Backend  # noqa: E402
from qvg_paged.kernels.block_table import BlockTable  # noqa: E402
from qvg_paged.kernels.decode import decode_pages  # noqa: E402
from qvg_paged.kernels.formats import FORMATS  # noqa: E402
from qvg_paged.kernels.layout import GRANULE, PageLayout  # noqa: E402

DEVICE = "cuda"
L2_BYTES = 64 << 20


class Pages:
    """Random pages of several layers in one pool, and dense copies of what they hold."""

    def __init__(
        self, batch_pages: list[int], *, heads: int, head_dim: int, tokens: int, layers: int, fmt: str
    ) -> None:
        self.layers, self.tokens, self.heads, self.dim = layers, tokens, heads, head_dim
        self.layout = PageLayout.build(
            FORMATS[fmt], num_layers=layers, tokens=tokens, heads=heads, head_dim=head_dim, dtype=torch.bfloat16,
            span_tokens=37_440,
        )  # fmt: skip
        page, book = self.layout.page_nbytes, self.layout.codebook_nbytes
        count = sum(batch_pages)
        self.buffer = torch.empty(GRANULE + count * page + len(batch_pages) * book, dtype=torch.uint8, device=DEVICE)
        self.buffer.random_(0, 256)
        pages, books, indptr, at = [], [], [0], GRANULE
        for n in batch_pages:
            books += [at // GRANULE] * n
            self._codebook(at)
            at += book
            for _ in range(n):
                pages.append(at // GRANULE)
                self._page(at)
                at += page
            indptr.append(len(pages))
        self.table = BlockTable(
            pages=tuple(pages), codebooks=tuple(books), formats=(0,) * count, positions=(0.0,) * count,
            indptr=tuple(indptr), device=self.buffer.device,
        )  # fmt: skip

    def _parts(self) -> list[tuple[Any, int, int]]:
        made = []
        for layer in range(self.layers):
            made.append((self.layout.key, self.layout.key_offset(layer), self.layout.key_codebook_offset(layer)))
            made.append((self.layout.value, self.layout.value_offset(layer), self.layout.value_codebook_offset(layer)))
        return made

    def _page(self, at: int) -> None:
        for part, offset, _ in self._parts():
            if not part.codec.is_dense:
                scales = part.plane("scales").view(self.buffer, at + offset)
                scales.copy_(0.1 + 0.3 * torch.rand(scales.shape, device=DEVICE))
            else:
                values = part.plane("values").view(self.buffer, at + offset)
                values.normal_()

    def _codebook(self, at: int) -> None:
        for part, _, offset in self._parts():
            if part.codebook_planes:
                part.plane("centroids").view(self.buffer, at + offset).normal_()
                part.plane("balance").view(self.buffer, at + offset).uniform_(0.5, 2.0)

    def dense(self, layer: int, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V ``[tokens, heads, head_dim]`` of one sequence, bfloat16 values in float32."""
        some = slice(*self.table.indptr[sequence : sequence + 2])
        group = self.table.groups[0]
        outs = []
        for part, offset, book in self._parts()[2 * layer : 2 * layer + 2]:
            out = torch.empty((some.stop - some.start) * self.tokens, self.heads, self.dim, device=DEVICE)
            decode_pages(
                self.buffer, group.pages[some], group.codebooks[some], part, offset, book, out, backend=Backend.TORCH
            )
            outs.append(out)
        return outs[0], outs[1]

    def attend(self, layer: int, q: torch.Tensor, cu: list[int]) -> torch.Tensor:
        """The direct path."""
        return paged_attention(
            q, self.buffer, self.table, [self.layout], layer, cu_seqlens_q=cu, path=AttentionPath.DIRECT
        )[0]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Float32 attention of ``[queries, heads, dim]``, heads in turn."""
    group = q.shape[1] // k.shape[1]
    outs = []
    for head in range(q.shape[1]):
        scores = q[:, head].double() @ k[:, head // group].double().T * q.shape[2] ** -0.5
        outs.append((scores.softmax(-1) @ v[:, head // group].double()).float())
    return torch.stack(outs, 1)


def check(pages: Pages, q: torch.Tensor, cu: list[int], *, sequences: list[int]) -> dict[str, float]:
    """Relative error of the direct path and of BF16 attention to the decoded keys."""
    out = pages.attend(0, q, cu)
    ours, theirs, norm = 0.0, 0.0, 0.0
    for b in sequences:
        rows = slice(cu[b], cu[b + 1])
        k, v = pages.dense(0, b)
        truth = exact(q[rows], k, v)
        heads = [x.to(torch.bfloat16).transpose(0, 1)[None] for x in (q[rows], k, v)]
        bf16 = F.scaled_dot_product_attention(*heads, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)
        ours += (out[rows].float() - truth).square().sum().item()
        theirs += (bf16.float() - truth).square().sum().item()
        norm += truth.square().sum().item()
    result = {"error": math.sqrt(ours / norm), "bf16_error": math.sqrt(theirs / norm)}
    result["right"] = bool(result["error"] <= 2 * result["bf16_error"])
    return result


def timed(calls: Callable[[], object], count: int, rep: int = 30) -> dict[str, float]:
    """Milliseconds a call: median, and the quartiles' distance, of graph replays."""
    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    replays = max(5, min(200, int(rep / max(start.elapsed_time(stop), 1e-3))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) / count for begin, end in events)
    quarter = statistics.quantiles(times, n=4)
    return {"ms": statistics.median(times), "spread_ms": quarter[2] - quarter[0], "replays": replays}


def dense_rows(
    q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], *, cudnn: bool
) -> dict[str, dict[str, float]]:
    """Dense attention on resident BF16; `q` ``[batch, heads, queries, dim]``, `keys` one pair per call."""
    rows = {}

    def sdpa(backend: SDPBackend, query: torch.Tensor) -> Callable[[], object]:
        def calls() -> object:
            with sdpa_kernel(backend):
                return [F.scaled_dot_product_attention(query, k, v, enable_gqa=query.shape[1] != k.shape[1])
                        for k, v in keys]  # fmt: skip

        return calls

    systems: dict[str, Callable[[], object]] = {"flash": sdpa(SDPBackend.FLASH_ATTENTION, q)}
    if cudnn:
        systems["cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION, q)
    batch, heads, queries, dim = q.shape
    kv_heads = keys[0][0].shape[1]
    if heads != kv_heads:  # a group's heads as queries of one head: each key is read once
        folded = q.view(batch, kv_heads, heads // kv_heads * queries, dim)
        systems["flash, heads folded"] = sdpa(SDPBackend.FLASH_ATTENTION, folded)
        if cudnn:
            systems["cudnn, heads folded"] = sdpa(SDPBackend.CUDNN_ATTENTION, folded)
    systems |= xformers_systems(q, keys)
    for name, calls in systems.items():
        try:
            rows[name] = timed(calls, len(keys))
        except Exception as error:
            rows[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    return rows


def xformers_systems(q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Callable[[], object]]:
    """Its split-K kernel, where the package is installed."""
    try:
        from xformers.ops import fmha  # noqa: PLC0415
        from xformers.ops.fmha import triton_splitk  # noqa: PLC0415
    except Exception:
        return {}
    batch, heads, queries, dim = q.shape
    groups = keys[0][0].shape[1]
    folded = q.view(batch, groups, heads // groups, queries, dim).permute(0, 3, 1, 2, 4)

    def calls() -> object:
        made = []
        for k, v in keys:
            wide = [x.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, heads // groups, -1) for x in (k, v)]
            made.append(fmha.memory_efficient_attention_forward(folded, *wide, op=triton_splitk.FwOp))
        return made

    return {"xformers split-K": calls}


def fresh_keys(batch: int, heads: int, tokens: int, dim: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of BF16 K and V, enough of them to exceed the L2 cache."""
    nbytes = 4 * batch * heads * tokens * dim
    shape = (batch, heads, tokens, dim)
    return [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))  # type: ignore[misc]
        for _ in range(math.ceil(2 * L2_BYTES / nbytes))
    ]


def layers_for(batch_pages: list[int], heads: int, dim: int, tokens: int) -> int:
    """Layers whose quantised keys together exceed the L2 cache."""
    return max(1, math.ceil(2 * L2_BYTES / (sum(batch_pages) * tokens * heads * dim * 35 / 64)))


def case(
    name: str, *, batch: int, q_heads: int, heads: int, queries: int, pages: int, dim: int = 128, tokens: int = 1560,
    cudnn: bool = False, dense: bool = True, fmt: str = "qvg4-int2",
) -> dict[str, Any]:  # fmt: skip
    """One row: check, then time."""
    layers = layers_for([pages] * batch, heads, dim, tokens)
    pool = Pages([pages] * batch, heads=heads, head_dim=dim, tokens=tokens, layers=layers, fmt=fmt)
    q = torch.randn(batch * queries, q_heads, dim, dtype=torch.bfloat16, device=DEVICE)
    cu = [queries * b for b in range(batch + 1)]
    row: dict[str, Any] = {
        "name": name, "batch": batch, "q_heads": q_heads, "kv_heads": heads, "queries": queries,
        "keys": pages * tokens, "head_dim": dim, "layers_per_replay": layers,
    }  # fmt: skip
    row |= check(pool, q[:, :], cu, sequences=[0, batch - 1] if queries <= 64 else [0]) if queries <= 512 else {}
    row["direct"] = timed(lambda: [pool.attend(layer, q, cu) for layer in range(layers)], layers)
    flops = 4.0 * batch * q_heads * queries * pages * tokens * dim
    nbytes = batch * heads * pages * tokens * (dim // 2 + 2 * (dim // 64) + 2)
    row["direct"] |= {"tflops": flops / row["direct"]["ms"] / 1e9, "gbytes_s": nbytes / row["direct"]["ms"] / 1e6}
    if dense:
        keys = fresh_keys(batch, heads, pages * tokens, dim)
        query = q.view(batch, queries, q_heads, dim).transpose(1, 2).contiguous()
        row["dense"] = dense_rows(query, keys, cudnn=cudnn)
        best = min(r["ms"] for r in row["dense"].values() if "ms" in r)
        row["ratio"] = best / row["direct"]["ms"]
    return row


def ragged(histories: list[int], queries: int, heads: int) -> dict[str, Any]:
    """Streams of different histories in one call, against a call for each."""
    layers = layers_for(histories, heads, 128, 1560)
    pool = Pages(histories, heads=heads, head_dim=128, tokens=1560, layers=layers, fmt="qvg4-int2")
    batch = len(histories)
    q = torch.randn(batch * queries, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    cu = [queries * b for b in range(batch + 1)]
    singles = []
    for b in range(batch):
        some = slice(*pool.table.indptr[b : b + 2])
        singles.append(
            BlockTable(
                pages=pool.table.pages[some], codebooks=pool.table.codebooks[some], formats=pool.table.formats[some],
                positions=pool.table.positions[some], indptr=(0, histories[b]), device=pool.table.device,
            )
        )  # fmt: skip

    def one_by_one() -> object:
        return [
            paged_attention(q[cu[b] : cu[b + 1]], pool.buffer, single, [pool.layout], layer,
                            cu_seqlens_q=[0, queries], path=AttentionPath.DIRECT)
            for layer in range(layers) for b, single in enumerate(singles)
        ]  # fmt: skip

    together = timed(lambda: [pool.attend(layer, q, cu) for layer in range(layers)], layers)
    apart = timed(one_by_one, layers)
    even = math.ceil(sum(histories) / batch)
    regular = Pages([even] * batch, heads=heads, head_dim=128, tokens=1560, layers=layers, fmt="qvg4-int2")
    equal = timed(lambda: [regular.attend(layer, q, cu) for layer in range(layers)], layers)
    row: dict[str, Any] = {"name": f"ragged {histories} pages, {queries} queries, {heads} heads"}
    row |= check(pool, q, cu, sequences=[0, batch - 1]) if queries <= 512 else {}
    row |= {"together": together, "apart": apart, "equal_histories": equal}
    row["faster_than_apart"] = apart["ms"] / together["ms"]
    row["against_equal_work"] = together["ms"] / (equal["ms"] * sum(histories) / (even * batch))
    return row


def rows_of(section: str) -> list[Callable[[], dict[str, Any]]]:
    """Rows of a section, to be run one after another."""
    if section == "decode":
        return [
            lambda: case("decode GQA", batch=8, q_heads=32, heads=8, queries=1, pages=21),
            lambda: case("decode MHA", batch=8, q_heads=32, heads=32, queries=1, pages=21),
        ]
    if section == "few":
        return [
            lambda h=h, n=n, p=p: case("few", batch=1, q_heads=h, heads=h, queries=n, pages=p, cudnn=True)  # type: ignore[misc]
            for h in (12, 40) for n in (16, 64) for p in (18, 53)
        ]  # fmt: skip
    if section == "chunk":
        return [
            lambda h=h, n=n, p=p: case("chunk", batch=1, q_heads=h, heads=h, queries=n, pages=p, cudnn=True)  # type: ignore[misc]
            for n in (256, 4680) for h in (12, 40) for p in (18, 53)
        ]  # fmt: skip
    if section == "shapes":
        return [
            lambda: case("head_dim 64", batch=8, q_heads=32, heads=32, queries=1, pages=21, dim=64),
            lambda: case("head_dim 256", batch=8, q_heads=16, heads=16, queries=1, pages=21, dim=256),
            lambda: case("grouped, 16 queries", batch=1, q_heads=40, heads=8, queries=16, pages=18, cudnn=True),
        ]
    histories = [2, 5, 9, 14, 18, 24, 31, 53]
    return [lambda: ragged(histories, 16, 12), lambda: ragged(histories, 1, 32), lambda: ragged(histories, 1560, 12)]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/direct_reads.json"))
    parser.add_argument("--only", action="append", choices=["decode", "few", "chunk", "ragged", "shapes"])
    arguments = parser.parse_args()
    results = []
    for section in arguments.only or ["decode", "few", "ragged", "chunk", "shapes"]:
        for row in rows_of(section):
            try:
                results.append({"section": section, **row()})
            except Exception as error:
                traceback.print_exc()
                results.append({"section": section, "failed": f"{type(error).__name__}: {error}"})
            print(json.dumps(results[-1], default=str), flush=True)
            torch.cuda.empty_cache()
            results_file.write(
                arguments.json, results_file.result(device=DEVICE, config=vars(arguments), results=results)
            )
    return 0 if all(row.get("right", True) and "failed" not in row for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
