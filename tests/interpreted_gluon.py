"""A Gluon kernel in Triton's interpreter: the same source with layouts ignored and its inline assembly emulated.

What it shows is that the algorithm is right. Which register holds what is the compiler's and the GPU tests' affair.
"""

import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl


class _Layout:
    """Any layout, and whatever is asked of it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str) -> "_Layout":
        return _Layout()


class _Language:
    """`gl` on top of `tl`: looked up late, since the interpreter replaces what is in `tl` while a kernel runs."""

    DistributedLinearLayout = NVMMADistributedLayout = DotOperandLayout = SliceLayout = _Layout

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def arange(self, start: int, end: int, _: object = None) -> Any:
        return tl.arange(_plain(start), _plain(end))

    def zeros(self, shape: list[int], dtype: Any, _: object = None) -> Any:
        return tl.zeros([_plain(n) for n in shape], dtype)

    def full(self, shape: list[int], value: Any, dtype: Any, _: object = None) -> Any:
        return tl.full([_plain(n) for n in shape], value, dtype)

    def convert_layout(self, x: Any, _: object) -> Any:
        return x

    def inline_asm_elementwise(self, asm: Any, _: str, inputs: list[Any], dtype: Any, **__: object) -> Any:
        words = [_words(x) for x in inputs]
        shape = [_plain(n) for n in inputs[0].shape]
        outputs = [_typed(out, shape, dtype[i] if isinstance(dtype, tuple) else dtype)
                   for i, out in enumerate(_emulate(str(getattr(asm, "value", asm)), words))]  # fmt: skip
        return tuple(outputs) if isinstance(dtype, tuple) else outputs[0]


def _plain(value: Any) -> int:
    while isinstance(value, tl.constexpr):
        value = value.value
    return int(value)


def _words(x: Any) -> np.ndarray:
    return np.ascontiguousarray(x.handle.data).view(np.uint32)


def _typed(words: list[np.ndarray], shape: list[int], dtype: Any) -> Any:
    stacked = np.stack([w.astype(np.uint32) for w in words], -1)
    kinds = {tl.uint8: np.uint8, tl.float16: np.float16, tl.int32: np.int32, tl.float32: np.float32}
    made = np.ascontiguousarray(stacked).view(kinds[dtype]).reshape(shape)
    handle = triton.runtime.interpreter.TensorHandle(made, dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, shape))


def _emulate(asm: str, words: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Per output tensor, its registers per instance of the assembly."""
    if "e4m3x2" in asm:
        floats = [torch.from_numpy(((words[0] >> 8 * i) & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn).float()
                  for i in range(4)]  # fmt: skip
        return [[x.numpy().view(np.uint32)] for x in floats]
    if "0x4441" in asm:
        return [[(words[0] >> 8 * i) & 0xFF] for i in range(4)]
    if "0x5410" in asm:
        even, odd = words
        low, high = (even & 0xFFFF) | (odd & 0xFFFF) << 16, even >> 16 | odd >> 16 << 16
        return [[low], [low >> 8], [high], [high >> 8]]
    if "and.b32" in asm:
        mask = np.uint32(int(asm.split("$2, ")[1].split(";", maxsplit=1)[0]))
        return [[words[0] & mask, words[1] & mask]]
    assert asm.startswith("shr.u32 $0, $1, 8")
    return [[words[0] >> 8]]


def _product(a: Any, b: Any, acc: Any) -> Any:
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


def interpreted(path: Path) -> types.ModuleType:
    """The Gluon module at `path` with its kernels interpreted."""
    assert struct.calcsize("P") == 8
    tl.core.block_type.layout = _Layout()
    # Line numbers stay: the interpreter reads the source again.
    lines = ["" if line.startswith("from triton.experimental") else line for line in path.read_text().splitlines()]
    module = types.ModuleType("interpreted_" + path.stem)
    module.__dict__.update(gl=_Language(), gluon=types.SimpleNamespace(jit=triton.jit), mma_v2=_product, tl=tl)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile("\n".join(lines), str(path), "exec"), module.__dict__)
    for value in list(vars(module).values()):
        if hasattr(value, "rewrite"):
            rewritten = value.rewrite()
            rewritten.__annotations__ = dict.fromkeys(rewritten.__annotations__, "constexpr")
    return module
