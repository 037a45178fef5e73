"""Compiles the kernels of the FP8 path for sm_90, which needs ptxas but no GPU; prints a row per kernel as JSON.

Exit status 77: there is no compiler here. Run by the tests in a process without Triton's interpreter.
"""

import json
import re
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
    name: str, kernel: Any, constants: dict[str, Any], types: dict[str, Any], **options: int
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
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = done.asm["ptx"]
    sums, fresh = ptx.count("wgmma.commit_group"), len(re.findall(r"wgmma\.mma_async.*, 0, 1, 1;", ptx))
    return {"kernel": name, "shared": done.metadata.shared, "fp8_products": "wgmma" in ptx, "from_zero": fresh >= sums}


def attention(head_dim: int) -> Any:
    shape = launch_shape(head_dim)
    constants = {"HEAD_DIM": head_dim, "M": shape.rows, "N": shape.keys, "group": 1}
    types = {"out": "*bf16", "scale_log2": "fp32"}
    kernel = _fp8_attention_triton._attention_kernel
    registers = {} if shape.registers is None else {"maxnreg": shape.registers}
    return compile_kernel(
        f"attention {head_dim}", kernel, constants, types, num_warps=shape.num_warps, num_stages=shape.num_stages,
        **registers,
    )  # fmt: skip


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
    return compile_kernel(f"decode {name}", _fp8_decode_triton._decode_kernel, constants, types, num_warps=warps)


def main() -> None:
    try:
        from triton import knobs  # noqa: PLC0415

        assert knobs.nvidia.ptxas.path
    except Exception as error:
        print(f"no compiler for sm_90: {error}")  # noqa: T201
        sys.exit(77)
    rows = [attention(head_dim) for head_dim in (64, 128, 256)]
    rows += [decode("qvg4-int2", False, True), decode("qvg4-int2", True, False)]
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
