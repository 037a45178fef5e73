"""A Gluon kernel of several kinds of warps in Triton's interpreter: threads that take turns, barriers in shared memory.

A thread goes on until a barrier holds it, and writers go first, so that they run as far ahead as their ring lets them:
a barrier that is missing shows in the result. What `interpreted_gluon` says of layouts holds here as well.
"""

import ctypes
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from interpreted_gluon import _Language, _Layout, _plain, _Shared, finish

SHARED = np.full(1 << 15, 0xFFFFFFFF, np.uint32)
"""What is read by address: where a program's shared memory starts."""
COPIES: list[tuple[int, np.ndarray]] = []
"""Copies to it that nobody has waited for."""
TURN = threading.Condition()
PATIENCE = 120


class _Tile(_Shared):
    """A buffer that may be written in parts, or a barrier."""

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.pieces: dict[tuple[int, int], Any] = {}
        self.arrivals = self.expected = self.phase = 0

    def index(self, i: Any) -> "_Tile":
        return self.parts.setdefault(_number(i), _Tile())  # type: ignore[return-value]

    def slice(self, start: Any, _length: Any, dim: int = 0) -> "_Part":
        return _Part(self, (0, 0)).slice(start, _length, dim)

    def store(self, value: Any) -> None:
        self.pieces = {(0, 0): value}

    def _keep_alive(self) -> None:
        pass

    def permute(self, _: tuple[int, ...]) -> _Shared:
        turned = _Shared(self.value())
        turned.turned = True
        return turned

    def value(self) -> Any:
        assert self.pieces, "shared memory was read before it was written"
        rows = sorted({row for row, _ in self.pieces})
        columns = sorted({column for _, column in self.pieces})
        data = np.block([[self.pieces[row, column].handle.data for column in columns] for row in rows])
        return _tensor(data, tl.bfloat16)


class _Part:
    def __init__(self, tile: _Tile, at: tuple[int, int]) -> None:
        self.tile, self.at = tile, at

    def slice(self, start: Any, _length: Any, dim: int = 0) -> "_Part":
        row, column = self.at
        by = _plain(start)
        return _Part(self.tile, (row + by, column) if _plain(dim) == 0 else (row, column + by))

    def store(self, value: Any) -> None:
        self.tile.pieces[self.at] = value


class _Barrier:
    """`hopper.mbarrier`."""

    MBarrierLayout = _Layout

    @staticmethod
    def init(barrier: _Tile, count: Any) -> None:
        barrier.expected = _plain(count)

    @staticmethod
    def wait(barrier: _Tile, phase: Any) -> None:
        parity = _number(phase)
        passed = TURN.wait_for(lambda: barrier.phase % 2 != parity, timeout=PATIENCE)
        assert passed, "a barrier was never reached by those it waits for"

    @staticmethod
    def arrive(barrier: _Tile, count: Any = 1) -> None:
        barrier.arrivals += _plain(count)
        if barrier.arrivals == barrier.expected:
            barrier.arrivals, barrier.phase = 0, barrier.phase + 1
            TURN.notify_all()
        assert barrier.arrivals < barrier.expected


class _Warps(_Language):
    SwizzledSharedLayout = _Layout

    def barrier(self) -> None:
        """Warps of one partition are one thread."""

    def convert_layout(self, x: Any, _: object, **__: object) -> Any:
        return x

    def allocate_shared_memory(self, _dtype: Any, _shape: list[int], _: object, value: Any = None) -> _Tile:
        return _Tile(value)

    def num_warps(self) -> int:
        return 4

    def inline_asm_elementwise(self, asm: Any, _: str, inputs: list[Any], **__: object) -> Any:
        text = str(getattr(asm, "value", asm))
        if "0x00100010" in text:
            return _scales(inputs[0])
        if "vote.sync" in text:
            return inputs[0] * inputs[1]
        if "shf.r.wrap" in text:
            return _levels(text, *inputs)
        return _copied(text, inputs)

    def warp_specialize(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: object) -> None:
        """Every partition to its end, the last one first."""
        failures: list[BaseException] = []

        def run(partition: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            with TURN:
                try:
                    partition(*arguments)
                except BaseException as failure:  # raised again below
                    failures.append(failure)

        threads = [threading.Thread(target=run, args=partition) for partition in reversed(partitions)]
        finish(threads, failures)


def _fused(a: Any, b: _Shared, acc: Any, *, use_acc: bool = True, **_: object) -> Any:
    left = a.value() if isinstance(a, _Shared) else a
    made = tl.dot(left.to(tl.float32), b.value().to(tl.float32))
    return acc + made if use_acc else made


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _number(value: Any) -> int:
    return int(value.handle.data.flat[0]) if hasattr(value, "handle") else _plain(value)


def _tensor(data: np.ndarray, dtype: Any) -> Any:
    handle = triton.runtime.interpreter.TensorHandle(np.ascontiguousarray(data), dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, list(data.shape)))


def _scales(words: Any) -> Any:
    data = words.handle.data
    value = torch.from_numpy((data & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    twice = ((value.view(np.uint32) >> 16) * np.uint32(0x10001)).view(np.int32)
    return _tensor(twice.reshape(data.shape), tl.int32)


def _levels(asm: str, codes: Any, scale: Any, at: Any, turned: Any) -> tuple[Any, ...]:
    """Eight channels of two words, rounded once, with a centroid row that is looked up."""

    def constant(before: str) -> int:
        return int(asm.split(before)[1].split(";", maxsplit=1)[0])

    shape = codes.handle.data.shape
    words = np.ascontiguousarray(codes.handle.data).view(np.uint32).reshape(*shape, 2).astype(np.uint64)
    by = (turned.handle.data.astype(np.int64) & 31).astype(np.uint64)[..., None]
    made = ((words << 32 | words) >> by).astype(np.uint32) & np.uint32(constant("and.b32 t, t, "))
    level = 128.0 + _bf16(np.uint32(constant("mov.b32 base, ") & 0xFFFF)[None])
    factor = _bf16(scale.handle.data.view(np.uint32) & 0xFFFF)
    row = (at.handle.data + int(asm.split("[$10+")[1].split("]", maxsplit=1)[0])) // 4
    channels = []
    for channel in range(8):
        centroid = _bf16(SHARED[row + channel // 2] >> 16 * (channel % 2) & 0xFFFF)
        code = made[..., channel // 4] >> 8 * (channel % 4) & 0xFF
        value = ((level + code) * factor + centroid).astype(np.float32)
        bits = torch.from_numpy(value).bfloat16().view(torch.int16).numpy()
        channels.append(_tensor(bits.view(np.uint16), tl.bfloat16))
    return tuple(channels)


def _copied(asm: str, inputs: list[Any]) -> Any:
    """Copies to shared memory, which are there once they were waited for."""
    if "cp.async.cg" in asm:
        for to, source in zip(inputs[0].handle.data.flat, inputs[1].handle.data.flat, strict=True):
            COPIES.append((to // 4, np.ctypeslib.as_array((ctypes.c_uint32 * 4).from_address(int(source)))))
    elif "cp.async.wait_all" in asm:
        for word, values in COPIES:
            SHARED[word : word + 4] = values
        COPIES.clear()
    else:
        assert "global_smem" in asm, asm
        if "trap" in asm:  # a program begins
            SHARED[:] = 0xFFFFFFFF
        return tl.to_tensor(0)
    return inputs[0]


def interpreted(*paths: Path) -> types.ModuleType:
    """The last of some modules with its kernels interpreted; it may take functions from those before it."""
    tl.core.block_type.layout = _Layout()
    names: dict[str, Any] = {}
    for path in paths:
        module = _interpreted(path, names)
        names.update((name, vars(module)[name]) for name in vars(module)["__all__"])
    return module


def _interpreted(path: Path, names: dict[str, Any]) -> types.ModuleType:
    # Line numbers stay: the interpreter reads the source again.
    text = re.sub(r"^from (triton\.experimental|qvg_paged)[^(\n]*(\([^)]*\))?",
                  lambda found: "\n" * found[0].count("\n"), path.read_text(), flags=re.MULTILINE)  # fmt: skip
    module = types.ModuleType("interpreted_" + path.stem)
    module.__dict__.update(
        names, gl=_Warps(), gluon=types.SimpleNamespace(jit=triton.jit), mbarrier=_Barrier, warpgroup_mma=_fused,
        warpgroup_mma_wait=lambda _, values: values[0], fence_async_shared=lambda: None,
    )  # fmt: skip
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    for name, value in list(vars(module).items()):
        if hasattr(value, "rewrite") and name not in names:
            rewritten = value.rewrite()
            rewritten.__annotations__ = dict.fromkeys(rewritten.__annotations__, "constexpr")
    return module
