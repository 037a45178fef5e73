"""Compiles the kernels of the direct path for sm_90, which needs ptxas but no GPU; prints a row per variant as JSON.

Exit status 77: there is no compiler here. Run by the tests in a process without Triton's interpreter.
"""

import json
import re
import sys
from typing import Any

import torch

from qvg_paged.kernels import direct_attention, few_queries, many_queries
from qvg_paged.kernels._page_tiles import PartBytes, part_code
from qvg_paged.kernels.formats import FORMATS
from qvg_paged.kernels.layout import PageLayout

POINTERS = {
    "partials": "*fp32", "partial_lse": "*fp32", "q": "*bf16", "buffer": "*u8", "pages": "*i32", "codebooks": "*i32",
    "indptr": "*i32", "cu_queries": "*i32", "block_sequence": "*i32", "block_row": "*i32", "cos_frame": "*fp32",
    "sin_frame": "*fp32", "cos_space": "*fp32", "sin_space": "*fp32",
}  # fmt: skip
VARIANTS = [(64, "qvg4-int2", True), (128, "qvg4-int2", False), (256, "qvg-pro-int2", False), (128, "dense", True)]
FEW_QUERIES = [(64, 16), (128, 8)]
ALIGNED = [["tt.divisibility", 16]]


def compile_variant(head_dim: int, name: str, rotates: bool) -> dict[str, Any]:
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    layout = PageLayout.build(
        FORMATS[name], num_layers=1, tokens=1560, heads=4, head_dim=head_dim, dtype=torch.bfloat16,
        span_tokens=4680, split_pairs=rotates,
    )  # fmt: skip
    shape = direct_attention.launch_shape(layout, torch.bfloat16, 64, rotates)
    constants: dict[str, Any] = {
        "KEY": part_code(layout.key), "VALUE": part_code(layout.value), "HEAD_DIM": head_dim, "ROTATE": rotates,
        "INTERLEAVED": True, "M": shape.rows, "N": shape.tokens,
    }  # fmt: skip
    if not rotates:
        constants |= dict.fromkeys(("cos_frame", "sin_frame", "cos_space", "sin_space"))
    kernel = direct_attention._direct_kernel
    types: dict[str, Any] = {**POINTERS, "scale_log2": "fp32"}
    types |= {part: PartBytes(*["i32"] * len(PartBytes._fields)) for part in ("key_part", "value_part")}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {arg: types.get(arg, "i32") for arg in kernel.arg_names}
    places = {arg: i for i, arg in enumerate(kernel.arg_names)}
    attributes = {(places[arg],): ALIGNED for arg in (*POINTERS, "q_stride", "q_head_stride") if arg not in constants}
    attributes |= {(places[part], i): ALIGNED for part in ("key_part", "value_part") for i in range(6)}
    source = ASTSource(
        kernel, signature=signature, constexprs={(places[k],): v for k, v in constants.items()}, attrs=attributes
    )
    target = GPUTarget("cuda", 90, 32)
    done = triton.compile(source, target=target, options={"num_warps": shape.num_warps, "num_stages": shape.num_stages})
    return {"head_dim": head_dim, "format": name, "rotates": rotates, "shared": done.metadata.shared}


def compile_gluon(
    kernel: Any, pointers: dict[str, str], numbers: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Any:
    """A kernel that reads two parts of pages, its pointers aligned; arguments without a type are integers."""
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.experimental.gluon._runtime import GluonASTSource  # noqa: PLC0415

    types: dict[str, Any] = {**pointers, **numbers, **dict.fromkeys(constants, "constexpr")}
    types |= {part: PartBytes(*["i32"] * len(PartBytes._fields)) for part in ("key_part", "value_part")}
    places = {arg: i for i, arg in enumerate(kernel.arg_names)}
    attributes = {(places[arg],): ALIGNED for arg in pointers}
    attributes |= {(places[part], i): ALIGNED for part in ("key_part", "value_part") for i in range(6)}
    source = GluonASTSource(
        kernel, {arg: types.get(arg, "i32") for arg in kernel.arg_names},
        {(places[arg],): value for arg, value in constants.items()}, attributes,
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_few_queries(head_dim: int, rows: int) -> dict[str, Any]:
    from qvg_paged.kernels._few_queries_gluon import few_queries_kernel as kernel  # noqa: PLC0415

    layout = PageLayout.build(
        FORMATS["qvg4-int2"], num_layers=1, tokens=1560, heads=4, head_dim=head_dim, dtype=torch.bfloat16,
        span_tokens=4680,
    )  # fmt: skip
    constants = {
        "VALUE": part_code(layout.value), "BLOCKS": head_dim // 64, "ROWS": rows, "ALIGNED": True, "OVERLAP": True,
    }  # fmt: skip
    pointers = {"partials": "*fp32", "partial_lse": "*fp32", "tables": "*fp32", "buffer": "*u8", "pages": "*i32",
                "items": "*i32"}  # fmt: skip
    done = compile_gluon(kernel, pointers, {}, constants, {"num_warps": few_queries.WARPS})
    return {"head_dim": head_dim, "rows": rows, "shared": done.metadata.shared}


def compile_many_queries(blocks: int) -> dict[str, Any]:
    from qvg_paged.kernels._many_queries_gluon import many_queries_kernel as kernel  # noqa: PLC0415

    layout = PageLayout.build(
        FORMATS["qvg4-int2"], num_layers=1, tokens=1560, heads=4, head_dim=128, dtype=torch.bfloat16, span_tokens=4680
    )
    constants: dict[str, Any] = {
        "KEY": part_code(layout.key), "VALUE": part_code(layout.value), "HEAD_DIM": 128, "BLOCKS": blocks,
        **many_queries.LAUNCHES[blocks],
    }  # fmt: skip
    pointers = {"partials": "*fp32", "partial_lse": "*fp32", "q": "*bf16", "buffer": "*u8", "pages": "*i32",
                "items": "*i32"}  # fmt: skip
    done = compile_gluon(kernel, pointers, {"scale_log2": "fp32"}, constants, {"num_warps": 4})
    ptx = done.asm["ptx"]
    starts = "|".join(re.findall(r"mov\.[bu]32\s+(%r\d+), global_smem;", ptx))
    offsets = re.findall(rf"global_smem\+(\d+)|add\.s32\s+%r\d+, (?:{starts}), (\d+);", ptx)
    buffers = sorted({int(a or b) for a, b in offsets})
    return {"head_dim": 128, "blocks": blocks, "shared": done.metadata.shared, "buffers": buffers}


def main() -> None:
    try:
        from triton import knobs  # noqa: PLC0415

        assert knobs.nvidia.ptxas.path
    except Exception as error:
        print(f"no compiler for sm_90: {error}")  # noqa: T201
        sys.exit(77)
    rows = [compile_few_queries(*few) for few in FEW_QUERIES] + [compile_variant(*variant) for variant in VARIANTS]
    rows += [compile_many_queries(blocks) for blocks in many_queries.LAUNCHES]
    print(json.dumps(rows))  # noqa: T201


if __name__ == "__main__":
    main()
