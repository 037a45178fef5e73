"""Compiles the kernels of the FP8 path for sm_90, which needs ptxas but no GPU; prints a row per kernel as JSON.

Exit status 77: there is no compiler here. Run by the tests in a process without Triton's interpreter.
"""

import json
import sys
from typing import Any

import torch

from qvg_paged.kernels import _fp8_attention_triton, _fp8_decode_triton
from qvg_paged.kernels._page_tiles import PartBytes, part_code
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.kernels.fp8_attention import launch_shape
from qvg_paged.kernels.layout import PageLayout

POINTERS = {
    "out": "*fp8e4nv", "words": "*i32", "lse": "*fp32", "queries": "*fp8e4nv", "query_scales": "*fp32",
    "keys": "*fp8e4nv", "values": "*fp8e4nv", "bounds": "*fp32", "buffer": "*u8", "pages": "*i32", "codebooks": "*i32",
    "cos_frame": "*fp16", "sin_frame": "*fp16", "cos_space": "*fp16", "sin_space": "*fp16", "q": "*bf16",
    "scales": "*fp32",
}  # fmt: skip
PART = PartBytes(*["i32"] * len(PartBytes._fields))
ALIGNED = [["tt.divisibility", 16]]


def compile_kernel(
    name: str, kernel: Any, constants: dict[str, Any], types: dict[str, Any], warps: int, stages: int
) -> Any:
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    known = {**POINTERS, **types, **dict.fromkeys(constants, "constexpr")}
    signature = {arg: known.get(arg, "i32") for arg in kernel.arg_names}
    places = {arg: i for i, arg in enumerate(kernel.arg_names)}
    aligned = [arg for arg in places if arg in (*POINTERS, "pitch") and arg not in constants]
    attributes: dict[tuple[int, ...], Any] = {(places[arg],): ALIGNED for arg in aligned}
    attributes |= {(places[arg], i): ALIGNED for arg in places if known.get(arg) is PART for i in range(6)}
    source = ASTSource(
        kernel, signature=signature, constexprs={(places[k],): v for k, v in constants.items()}, attrs=attributes
    )
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    return {"kernel": name, "shared": done.metadata.shared, "fp8_products": "wgmma" in done.asm["ptx"]}


def attention(head_dim: int) -> Any:
    rows, keys, warps, stages = launch_shape(head_dim)
    constants = {"HEAD_DIM": head_dim, "M": rows, "N": keys, "group": 1}
    types = {"out": "*bf16", "scale_log2": "fp32"}
    kernel = _fp8_attention_triton._attention_kernel
    return compile_kernel(f"attention {head_dim}", kernel, constants, types, warps, stages)


def decode(name: str, transposed: bool, rotates: bool) -> Any:
    layout = PageLayout.build(
        FORMATS[name], num_layers=1, tokens=1560, heads=4, head_dim=128, dtype=torch.bfloat16, span_tokens=4680,
        split_pairs=rotates,
    )  # fmt: skip
    rows, warps = _fp8_decode_triton.ROWS["values" if transposed else "turned" if rotates else "keys"]
    constants: dict[str, Any] = {
        "CODE": part_code(layout.value if transposed else layout.key), "PART": int(transposed), "D": 128, "R": rows,
        "ROPE": rotates, "INTERLEAVED": True, "WORDS": True,
    }  # fmt: skip
    if not rotates:
        constants |= dict.fromkeys(("cos_frame", "sin_frame", "cos_space", "sin_space"))
    types = {"part": PART} if transposed else {"part": PART, "words": "*fp8e4nv"}
    return compile_kernel(f"decode {name}", _fp8_decode_triton._decode_kernel, constants, types, warps, 3)


def main() -> None:
    try:
        from triton import knobs  # noqa: PLC0415

        assert knobs.nvidia.ptxas.path
    except Exception as error:
        print(f"no compiler for sm_90: {error}")  # noqa: T201
        sys.exit(77)
    rows = [attention(128), attention(256), decode("qvg4-int2", False, True), decode("qvg4-int2", True, False)]
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
