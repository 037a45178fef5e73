"""Our codec against the released Quant VideoGen kernels on one GPU, given the same centroids and ids.

    python benchmarks/compare_released.py --official CHECKOUT --json FILE

CHECKOUT is a clone of the Quant VideoGen repository; its kernels for subtracting centroids, quantising and packing,
and accumulating are run as they are (one configuration each: they differ in speed only). Compared are the codes, the
FP8 scales and the decoded BF16 values of at least a million blocks, among them zeros of both signs, subnormals, blocks
whose scale rounds to zero or saturates, and exact ties of scales and of levels. A difference at an exact tie is
counted, any other is listed. Exit status 0: no other difference, and ties in at most 1e-4 of all elements.
"""

import argparse
import json
import sys
import time
import types
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import results_file
import torch
import triton
import triton.language as tl
from bench.released import load_modules

from qvg_paged import ArgumentError
from qvg_paged.kernels._blocks import unpack_codes
from qvg_paged.kernels.backend import Backend
from qvg_paged.kernels.codec import EncodedSpan, decode_span, encode_span
from qvg_paged.kernels.formats import Codec, Grid

HEADS, DIM, CENTROIDS, TOKENS = 4, 128, 256, 1560
TIE_LIMIT = 1e-4
CASES = [(2, 64, 1), (2, 16, 4), (4, 64, 4), (4, 16, 1)]
ALL_CASES = [(bits, block, stages) for bits in (2, 4) for block in (64, 16) for stages in (1, 4)]


@dataclass
class Comparison:
    """One of our paths against the released kernels."""

    path: str
    elements: int
    blocks: int
    scale_ties: int = 0
    scale_differences: int = 0
    code_ties: int = 0
    code_differences: int = 0
    value_differences_elsewhere: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """No difference but ties, and few of those."""
        other = self.scale_differences + self.code_differences + self.value_differences_elsewhere
        return other == 0 and self.code_ties <= TIE_LIMIT * self.elements and self.scale_ties <= TIE_LIMIT * self.blocks


def load_official(path: Path) -> types.SimpleNamespace:
    """The three kernel modules, one configuration of each kernel."""
    try:
        return load_modules(path, ("real.quant_pack", "real.smooth", "real.accumulate"), configurations=1)
    except ArgumentError as error:
        raise SystemExit(str(error)) from None


def edge_tokens(bits: int, block: int, count: int) -> torch.Tensor:
    """BF16 tokens ``[count, HEADS, DIM]`` whose blocks are the awkward ones; they are quantised as they are."""
    top = 2 ** (bits - 1) - 1
    fp8 = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    blocks = torch.zeros(count * HEADS * DIM // block, block)
    kind = torch.arange(len(blocks)) % 10
    scale = fp8[torch.randint(0, len(fp8), (len(blocks), 1))]
    level = torch.randint(-top, top, blocks.shape) + 0.5
    half = (level * scale).bfloat16().float()  # exact ties of levels (where BF16 holds them)
    half[:, 0] = top * scale[:, 0]
    middle = (fp8[:-1] + fp8[1:]) / 2
    between = middle[torch.randint(0, len(middle), (len(blocks), 1))]
    tie = between * (2 * torch.rand_like(blocks) - 1) * top
    tie[:, 0] = top * between[:, 0]  # exact ties of scales
    noise = torch.randn_like(blocks)
    makers = [
        torch.zeros_like(blocks), -torch.zeros_like(blocks), noise * 1e-39, noise * 2.0**-12, half, half, tie, tie,
        noise * 5e3, torch.where(noise > 0, 0.0, noise),
    ]  # fmt: skip
    for number, maker in enumerate(makers):
        blocks = torch.where((kind == number)[:, None], maker, blocks)
    return blocks.bfloat16().view(count, HEADS, DIM)


def make_inputs(bits: int, block: int, stages: int, blocks: int, device: str) -> dict[str, torch.Tensor]:
    """Tokens, centroids and ids; every tenth token is an edge case, given the centroid that is zero."""
    frames = -(-blocks * block // (TOKENS * HEADS * DIM))
    tokens = frames * TOKENS
    centroids = (torch.randn(stages, HEADS, CENTROIDS, DIM) / torch.arange(1, stages + 1).view(-1, 1, 1, 1)).bfloat16()
    centroids[:, :, 0] = 0
    ids = torch.randint(1, CENTROIDS, (stages, HEADS, tokens))
    spread = torch.logspace(-3, 1, HEADS)[:, None]
    x = (torch.randn(tokens, HEADS, DIM) * spread).bfloat16()
    x[::10] = edge_tokens(bits, block, len(x[::10]))
    ids[:, :, ::10] = 0
    inputs = {"x": x, "centroids": centroids, "ids": ids.to(torch.uint8)}
    return {name: value.to(device) for name, value in inputs.items()}


def run_official(official: Any, data: dict[str, torch.Tensor], bits: int, block: int) -> dict[str, torch.Tensor]:
    """Residual, codes, scale values and decoded values of the released kernels, ``[tokens, HEADS, ...]``."""
    residual = data["x"].transpose(0, 1)[None].contiguous()  # [1, HEADS, tokens, DIM]
    centroids = [stage[None].contiguous() for stage in data["centroids"]]
    ids = [stage[None].contiguous() for stage in data["ids"]]
    for centroid, chosen in zip(centroids, ids, strict=True):
        residual = official.smooth.minus_centroid(residual, chosen, centroid)
    quantise = official.quant_pack.quant_pack
    packed, scales, _ = quantise(residual, block, bits, torch.float8_e4m3fn, pack_output_int8=True)
    values = official.accumulate.nstage_accum(
        centroids, ids, packed, scales, block, bits, PACK_INPUT_INT8=True, CLUSTER_ID_INT8=True,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    shifts = torch.arange(8 - bits, -1, -bits, device=packed.device)
    codes = (packed[..., None].int() >> shifts & (2**bits - 1)).flatten(-2)
    found = {"residual": residual, "codes": codes, "scales": scales.float(), "values": values}
    return {name: value[0].transpose(0, 1) for name, value in found.items()}


def run_ours(data: dict[str, torch.Tensor], codec: Codec, backend: Backend) -> dict[str, torch.Tensor]:
    """Codes, scale values and decoded values of one of our paths, ``[tokens, HEADS, ...]``."""
    span = encode_span(
        data["x"], codec, tokens_per_frame=TOKENS, initial_centroids=data["centroids"], ids=data["ids"],
        backend=backend,
    )  # fmt: skip
    parts = [read_frame(span, frame) for frame in range(span.frames)]
    codes, scales = (torch.cat(planes) for planes in zip(*parts, strict=True))
    return {"codes": codes, "scales": scales, "values": decode_span(span, torch.bfloat16, backend=backend)}


def read_frame(span: EncodedSpan, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a frame from its planes."""
    layout, offset = span.layout, span.part_offset(frame)
    packed = layout.plane("codes").view(span.buffer, offset)
    codes = torch.zeros((HEADS, TOKENS, DIM), dtype=torch.int32, device=packed.device)
    unpack_codes(packed, TOKENS, layout.codec.grid.bits, codes)
    scales = layout.plane("scales").view(span.buffer, offset).float()
    return codes.transpose(0, 1), scales.permute(2, 0, 1)


def compare(
    path: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bits: int, block: int
) -> Comparison:
    """Count what differs and tell exact ties from the rest."""
    top = 2 ** (bits - 1) - 1
    mine = {name: value.to(theirs["codes"].device) for name, value in ours.items()}
    rest = {name: value[: len(mine["codes"])] for name, value in theirs.items()}
    residual = rest["residual"].double().unflatten(-1, (-1, block))
    a, b = mine["scales"].double(), rest["scales"].double()
    wrong_scale = a != b
    scale_tie = wrong_scale & (residual.abs().amax(-1) * 2 == top * (a + b))
    codes_a, codes_b = (side["codes"].unflatten(-1, (-1, block)) for side in (mine, rest))
    wrong_code = (codes_a != codes_b) & ~wrong_scale[..., None]
    scale = b[..., None]
    whole = (residual.abs() / scale.clamp(min=1e-30)).round()
    tie = torch.zeros_like(wrong_code)
    for low in (whole - 1, whole):
        tie |= (residual.abs() * 2 == (2 * low + 1) * scale) & (scale > 0)
    code_tie = wrong_code & tie
    same = ~(wrong_code | wrong_scale[..., None]).flatten(-2)
    differ = (mine["values"].view(torch.int16) != rest["values"].view(torch.int16)) & same
    result = Comparison(
        path, codes_a.numel(), wrong_scale.numel(), int(scale_tie.sum()), int((wrong_scale & ~scale_tie).sum()),
        int(code_tie.sum()), int((wrong_code & ~tie).sum()), int(differ.sum()),
    )  # fmt: skip
    kinds = {
        "scale": wrong_scale & ~scale_tie, "code": (wrong_code & ~tie).any(-1),
        "value": differ.unflatten(-1, (-1, block)).any(-1), "scale tie": scale_tie, "code tie": code_tie.any(-1),
    }  # fmt: skip
    for kind, where in kinds.items():
        for token, head, number in where.nonzero()[:2].tolist():
            at = (token, head, number)
            odd = (codes_a[at] != codes_b[at]).nonzero().flatten()[:6].tolist()
            result.examples.append({
                "kind": kind, "token": token, "head": head, "block": number,
                "absmax": float(residual[at].abs().max()), "scale_ours": float(a[at]), "scale_theirs": float(b[at]),
                "channels": odd, "residual": residual[at][odd].tolist(),
                "codes_ours": codes_a[at][odd].tolist(), "codes_theirs": codes_b[at][odd].tolist(),
            })  # fmt: skip
    return result


@triton.jit
def _divide_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr):  # noqa: N803 - as Triton spells constants
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i) / tl.load(y_ptr + i))


def reciprocal_probe(device: str) -> list[dict[str, float]]:
    """Significands of FP8 scales whose reciprocal, as `/` computes it, is not the correctly rounded one."""
    y = torch.arange(8, 16, device=device).float() / 8
    out = torch.zeros_like(y)
    _divide_kernel[(1,)](out, torch.ones_like(y), y, N=8)
    right = 1.0 / y.cpu()
    wrong = (out.cpu() != right).nonzero().flatten().tolist()
    return [{"significand": float(y[i]), "hardware": float(out[i]), "rounded": float(right[i])} for i in wrong]


def main() -> int:
    """Run the cases, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="clone of the Quant VideoGen repository")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--blocks", type=int, default=1 << 20, help="blocks per case, at least")
    parser.add_argument("--all", action="store_true", help="every combination of bits, block size and stages")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("compare_released: the released kernels need a CUDA device, found none")
    torch.manual_seed(0)
    official = load_official(args.official)
    probe = reciprocal_probe(args.device)
    print(f"reciprocals of scales not correctly rounded by the hardware: {probe or 'none'}")
    rows, good = [], True
    for bits, block, stages in ALL_CASES if args.all else CASES:
        start = time.perf_counter()
        data = make_inputs(bits, block, stages, args.blocks, args.device)
        theirs = run_official(official, data, bits, block)
        grid = Grid.TERNARY if bits == 2 else Grid.INT4
        codec = Codec(grid=grid, block_size=block, stages=stages, num_centroids=CENTROIDS)
        few = 4 * TOKENS
        on_cpu = {"x": data["x"][:few].cpu(), "centroids": data["centroids"].cpu(), "ids": data["ids"][..., :few].cpu()}
        results = [
            compare("triton", run_ours(data, codec, Backend.TRITON), theirs, bits, block),
            compare("torch", run_ours(data, codec, Backend.TORCH), theirs, bits, block),
            compare("torch-cpu", run_ours(on_cpu, codec, Backend.TORCH), theirs, bits, block),
        ]
        for result in results:
            good &= result.good
            print(
                f"int{bits} B={block} S={stages} {result.path:9} {result.blocks:8} blocks differ in: "
                f"scales {result.scale_differences} (+{result.scale_ties} ties), "
                f"codes {result.code_differences} (+{result.code_ties} ties), "
                f"values {result.value_differences_elsewhere}"
            )
            for example in result.examples:
                print("   ", json.dumps(example))
        seconds = round(time.perf_counter() - start, 2)
        paths = [asdict(result) for result in results]
        rows.append({"bits": bits, "block_size": block, "stages": stages, "seconds": seconds, "paths": paths})
    found = {"reciprocals": probe, "same": good, "cases": rows}
    results_file.write(args.json, results_file.result(device=args.device, config=vars(args), results=found))
    print("same" if good else "NOT the same", "->", args.json)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
