"""A Gluon kernel in Triton's interpreter: the same source with layouts ignored and its inline assembly emulated.

What it shows is that the algorithm is right. Which register holds what is the compiler's and the GPU tests' affair.
"""

import ctypes
import functools
import inspect
import re
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

NUMPY = {
    tl.uint8: np.uint8, tl.int32: np.int32, tl.bfloat16: np.uint16, tl.float16: np.float16, tl.float32: np.float32,
}  # fmt: skip


class _Layout:
    """Any layout, and whatever is asked of it."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __getattr__(self, name: str) -> "_Layout":
        return _Layout()

    @staticmethod
    def get_default_for(*_: object) -> "_Layout":
        return _Layout()


class _Shared:
    """A buffer in shared memory; what was never stored is not a number."""

    def __init__(self, value: Any = None, count: int = 1) -> None:
        self.slots = [value] * count
        self.parts: dict[int, _Shared] = {}
        self.turned = False

    def index(self, i: Any) -> "_Shared":
        return self.parts.setdefault(_plain(i.handle.data[0] if hasattr(i, "handle") else i), _Shared())

    def store(self, value: Any) -> None:
        self.slots = [value]

    def permute(self, _: tuple[int, ...]) -> "_Shared":
        turned = _Shared(self.slots[0])
        turned.turned = True
        return turned

    def value(self) -> Any:
        assert self.slots[0] is not None, "shared memory was read before it was written"
        return tl.trans(self.slots[0]) if self.turned else self.slots[0]


class _Region:
    """A run of `SHARED`."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.first, self.count = first, count

    def index(self, i: Any) -> "_Region":
        return _Region(self.count, _plain(i) * self.count)

    def store(self, value: Any) -> None:
        SHARED[self.first : self.first + self.count] = value.handle.data.view(np.uint32)


class _Language:
    """`gl` on top of `tl`: looked up late, since the interpreter replaces what is in `tl` while a kernel runs."""

    BlockedLayout = DistributedLinearLayout = NVMMADistributedLayout = NVMMASharedLayout = _Layout
    DotOperandLayout = SliceLayout = SwizzledSharedLayout = _Layout

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def arange(self, start: int, end: int, _: object = None) -> Any:
        return tl.arange(_plain(start), _plain(end))

    def zeros(self, shape: list[int], dtype: Any, _: object = None) -> Any:
        return tl.zeros([_plain(n) for n in shape], dtype)

    def full(self, shape: list[int], value: Any, dtype: Any, _: object = None) -> Any:
        return tl.full([_plain(n) for n in shape], value, dtype)

    def allocate_shared_memory(self, dtype: Any, shape: list[int], _: object, value: Any = None) -> Any:
        return _Region(_plain(shape[-1])) if dtype == tl.int32 else _Shared(value)

    def convert_layout(self, x: Any, _: object) -> Any:
        return x

    def histogram(self, x: Any, bins: int, layout: object = None) -> Any:
        del layout
        return tl.histogram(x, _plain(bins))

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
    data = np.ascontiguousarray(x.handle.data)
    return data.view(np.uint64 if data.itemsize == 8 else np.uint32)


def _typed(words: list[np.ndarray], shape: list[int], dtype: Any) -> Any:
    word = np.uint16 if dtype == tl.bfloat16 or words[0].dtype == np.uint16 else np.uint32
    stacked = np.stack([w.astype(word) for w in words], -1)
    made = np.ascontiguousarray(stacked).view(NUMPY[dtype]).reshape(shape or [1])
    handle = triton.runtime.interpreter.TensorHandle(made, dtype)
    return tl.core.tensor(handle, tl.block_type(dtype, shape) if shape else dtype)


def _emulate(asm: str, words: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Per output tensor, its registers per instance of the assembly."""
    if "set.eq.bf16x2" in asm:
        first, second = words
        return [[np.where((first ^ second) >> 16 * i & 0xFFFF, 0, 0x3F80) for i in range(2)]]
    if "f16x2" in asm:
        return [[x] for x in _emulate_halves(asm, words)]
    if any(what in asm for what in ("shared", "bar.", "%tid.x", "global_smem")):
        return [[_emulate_shared(asm, *words)]]
    if "0x4441" in asm:
        return [[(words[0] >> 8 * i) & 0xFF] for i in range(4)]
    if "0x5410" in asm:
        even, odd = words
        low, high = (even & 0xFFFF) | (odd & 0xFFFF) << 16, even >> 16 | odd >> 16 << 16
        return [[low], [low >> 8], [high], [high >> 8]]
    if "and.b32" in asm:
        mask = np.uint32(int(asm.split("$2, ")[1].split(";", maxsplit=1)[0]))
        return [[words[0][..., ::4] & mask, words[1][..., ::4] & mask]]
    raise AssertionError(asm)


def _emulate_halves(asm: str, words: list[np.ndarray]) -> list[np.ndarray]:
    if "mul.rn" in asm:
        return [(words[0].view(np.float16) * words[1].view(np.float16)).view(np.uint32)]
    scales = [torch.from_numpy(((words[0] >> 8 * i) & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn).float()
              for i in range(4)]  # fmt: skip
    return [x.numpy().view(np.uint32) if "cvt.f32" in asm else x.half().numpy().view(np.uint16) for x in scales]


SHARED = np.full(65536, 0xFFFFFFFF, np.uint32)
"""Shared memory of the program that runs; what it starts with is not what the last one left, but might be anything."""
PATIENCE = 120


def _emulate_shared(
    asm: str, at: np.ndarray, values: np.ndarray | None = None, factor: np.ndarray | None = None
) -> np.ndarray:
    if "global_smem" in asm:
        return np.zeros_like(at)
    if "%tid.x" in asm:
        return np.full_like(at, _here.warp)
    place = at // 4
    if "cp.async.cg" in asm:
        assert values is not None
        for to, source in zip(place.flat, values.flat, strict=True):
            SHARED[to : to + 4] = np.ctypeslib.as_array((ctypes.c_uint32 * 4).from_address(int(source)))
    elif "bar.sync" in asm:
        _here.meet()
    elif "red.shared.add" in asm:
        assert values is not None
        assert factor is not None
        fixed = np.rint(values.view(np.float32) * factor.view(np.float32))
        assert (fixed < 2**23).all()
        np.add.at(SHARED, place, fixed.astype(np.uint32))
    elif "st.shared.u32" in asm:
        assert values is not None
        SHARED[place] = np.rint(SHARED[place].astype(np.float32) * values.view(np.float32)).astype(np.uint32)
    elif "st.shared.f32" in asm:
        assert values is not None
        SHARED[place] = np.broadcast_to(values, place.shape)
    elif "ld.shared" in asm:
        return SHARED[place].astype(np.float32).view(np.uint32) if "cvt" in asm else SHARED[place]
    return at


class _Here(threading.local):
    """The warp that a thread is."""

    warp = 0

    def meet(self) -> None:
        """Wait for the other warps; one runs at a time."""
        TURN.release()
        self.barrier.wait(PATIENCE)
        TURN.acquire()

    barrier: threading.Barrier


_here = _Here()
TURN = threading.Lock()


def finish(threads: list[threading.Thread], failures: list[BaseException]) -> None:
    """Run threads that note their failures, to their ends; raises the first failure."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def run_as_warps(kernel: Any, count: int) -> None:
    """Let every program of `kernel` be run by `count` threads, which are its warps."""
    program = kernel.rewrite()

    @functools.wraps(program)
    def by_warps(**arguments: Any) -> None:
        barrier, failures = threading.Barrier(count), []

        def run(warp: int) -> None:
            _here.warp, _here.barrier = warp, barrier
            with TURN:
                try:
                    program(**arguments)
                except threading.BrokenBarrierError:  # another one has failed
                    TURN.acquire()
                except BaseException as failure:  # raised again below
                    failures.append(failure)
                    barrier.abort()

        threads = [threading.Thread(target=run, args=(warp,)) for warp in range(count)]
        finish(threads, failures)

    by_warps.__signature__ = inspect.signature(program)  # type: ignore[attr-defined]
    kernel.rewritten_fn[kernel.fn] = by_warps


def _fused(a: Any, b: _Shared, acc: Any, *, use_acc: bool = True, **_: object) -> Any:
    left = a.value() if isinstance(a, _Shared) else a
    made = tl.dot(left.to(tl.float32), b.value().to(tl.float32))
    return acc + made if use_acc else made


class _AsyncCopy:
    """Copies that are there at once."""

    @staticmethod
    def async_load(shared: _Shared, at: Any, mask: Any = None) -> None:
        shared.store(tl.load(at, mask=mask, other=0.0))

    @staticmethod
    def commit_group() -> None:
        pass

    @staticmethod
    def wait_group(_: int) -> None:
        pass


def _product(a: Any, b: Any, acc: Any) -> Any:
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


def interpreted(path: Path, parts: Sequence[Path] = ()) -> types.ModuleType:
    """The Gluon module at `path` with its kernels interpreted; `parts` are modules that it takes functions from."""
    tl.core.block_type.layout = _Layout()
    names: dict[str, Any] = {}
    for part in parts:
        made = vars(_interpreted(part, names))
        names.update((name, made[name]) for name in made["__all__"])
    return _interpreted(path, names)


def _interpreted(path: Path, names: dict[str, Any]) -> types.ModuleType:
    # Line numbers stay: the interpreter reads the source again.
    text = re.sub(r"^from (triton\.experimental|qvg_paged\.kernels\._(?:few|sum))[^(\n]*(\([^)]*\))?",
                  lambda found: "\n" * found[0].count("\n"), path.read_text(), flags=re.MULTILINE)  # fmt: skip
    module = types.ModuleType("interpreted_" + path.stem)
    module.__dict__.update(names)
    module.__dict__.update(gl=_Language(), gluon=types.SimpleNamespace(jit=triton.jit), mma_v2=_product, tl=tl)
    module.__dict__.update(
        warpgroup_mma=_fused, warpgroup_mma_wait=lambda _, values: values[0], fence_async_shared=lambda: None,
        async_copy=_AsyncCopy,
    )
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(text, str(path), "exec"), module.__dict__)
    for name, value in list(vars(module).items()):
        if hasattr(value, "rewrite") and name not in names:
            rewritten = value.rewrite()
            rewritten.__annotations__ = dict.fromkeys(rewritten.__annotations__, "constexpr")
    return module
