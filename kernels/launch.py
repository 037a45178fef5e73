"""Launches of Triton kernels at little cost to the host.

An ordinary launch binds, classifies and prints all arguments anew. Here the compiled kernel is looked up by what Triton
compiles for (constants, types, whether a pointer is a multiple of 16 bytes, whether an integer is 1 or a multiple of
16), and pointers go in as numbers. Launches can be recorded and repeated, which skips even that.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import repeat
from threading import local
from typing import Any

import torch
import triton
from triton.runtime import JITFunction

__all__ = ["Launch", "MovedLaunch", "launch", "movable", "overlapping", "recorded"]

Launch = Callable[[int], None]
"""A launch with all its arguments, on the raw CUDA stream it is given; memory it points to must still be there."""

MovedLaunch = Callable[[int, Sequence[int]], None]
"""Likewise; besides the stream it takes the addresses at which blocks of memory begin now."""

BIG = 1 << 31
ALL = 2
"""A parameter is specialised for 1 and for multiples of 16; on 1 it is for 1 only, on 0 for neither."""


class _Thread(local):
    record: list[Launch] | None = None


_thread = _Thread()
_compiled: dict[tuple[Any, ...], Any] = {}
_specialised: dict[int, tuple[JITFunction[Any], list[int]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run ``kernel[grid](*args, **constants)`` on the current device and stream, without Triton's launch hooks.

    Args:
        kernel: what ``triton.jit`` made; in the interpreter it runs as ever.
        grid: programs.
        args: all parameters that are not constants, in order: tensors, numbers, None, tuples of tensors or of integers.
        constants: ``tl.constexpr`` parameters and compile options.
    """
    if isinstance(kernel, JITFunction):
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        made = _bound(kernel, device, grid, args, constants)
        made(driver.get_current_stream(device))
    else:

        def made(_: int) -> None:
            kernel[grid](*args, **constants)

        made(0)
    if _thread.record is not None:
        _thread.record.append(made)


@lru_cache
def overlapping(device: torch.device) -> dict[str, bool]:
    """Constants of a launch that may begin before the one it follows has ended, for whose results its kernel waits."""
    overlaps = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of this thread inside the block, which run as well; repeating them repeats nothing else."""
    before = _thread.record
    _thread.record = launches = list[Launch]()
    try:
        yield launches
    finally:
        _thread.record = before


def _bound(
    kernel: "JITFunction[Any]", device: int, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> Launch:
    values, kinds = _classified(kernel, args)
    key = (id(kernel), device, *kinds, *constants, *constants.values())
    found = _compiled.get(key)
    if found is None:
        found = _compiled[key] = _compile(kernel, grid, args, constants)
    run, function, metadata, rest = found
    return _Bound(run, (*grid, 1, 1)[:3], function, metadata, [*values, *rest])


class _Bound:
    """A launch of a compiled kernel."""

    __slots__ = ("_function", "_grid", "_metadata", "_run", "_values")

    def __init__(
        self, run: Callable[..., None], grid: tuple[int, ...], function: Any, metadata: Any, values: list[Any]
    ) -> None:
        self._run, self._grid, self._function, self._metadata, self._values = run, grid, function, metadata, values

    def __call__(self, stream: int) -> None:
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *self._values)

    def moved(self, blocks: Sequence[torch.Tensor]) -> MovedLaunch:
        if any(isinstance(value, tuple) for value in self._values):
            raise TypeError("recorded_launch: expected no tuples among its arguments, which are not looked into")
        ends = [(block.data_ptr(), block.data_ptr() + block.nbytes) for block in blocks]
        inside = [
            (place, number, value - begin)
            for place, value in enumerate(self._values)
            for number, (begin, end) in enumerate(ends)
            if type(value) is int and begin <= value < end
        ]

        def launch_moved(stream: int, begins: Sequence[int]) -> None:
            values = self._values.copy()
            for place, number, offset in inside:
                values[place] = begins[number] + offset
            self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *values)

        return launch_moved


def movable(recorded_launch: Launch, blocks: Sequence[torch.Tensor]) -> MovedLaunch | None:
    """A recorded launch for memory that lies elsewhere next time; None where kernels are interpreted.

    Args:
        recorded_launch: of the list that `recorded` yields.
        blocks: pointers into these are taken for offsets in them; wherever they lie next must be as aligned.

    Raises:
        TypeError: an argument is a tuple.
    """
    return recorded_launch.moved(blocks) if isinstance(recorded_launch, _Bound) else None


def _compile(
    kernel: "JITFunction[Any]", grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> Any:
    """What launching a kernel takes; placeholders of its constants last."""
    rest = kernel.params[len(args) :]
    if not all(parameter.is_constexpr for parameter in rest):
        names = [parameter.name for parameter in rest if not parameter.is_constexpr]
        raise TypeError(f"args: expected all parameters that are not constants, {names} are missing")
    compiled = kernel.run(*args, grid=grid, warmup=True, **constants)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    run = compiled.run  # loads the kernel
    return run, compiled.function, compiled.packed_metadata, tuple(constants.get(p.name) for p in rest)


def _classified(kernel: "JITFunction[Any]", args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Arguments as a compiled kernel takes them, and what of them decides which one that is."""
    found = _specialised.get(id(kernel))
    if found is None:
        flags = [0 if p.do_not_specialize else 1 if p.do_not_specialize_on_alignment else ALL for p in kernel.params]
        found = _specialised[id(kernel)] = kernel, flags  # the kernel is kept, so that the id stays its own
    values: list[Any] = []
    kinds: list[Any] = []
    _classify(args, found[1], values, kinds)
    return values, kinds


@lru_cache(maxsize=4096)
def _numbers(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds: list[Any] = []
    _classify(numbers, repeat(ALL), [], kinds)
    return tuple(kinds)


def _classify(args: Iterable[Any], flags: Iterable[int], values: list[Any], kinds: list[Any]) -> None:
    for arg, special in zip(args, flags, strict=False):
        if arg is True or arg is False:  # an integer to Python, not to Triton
            values.append(arg)
            kinds.append(bool)
        elif isinstance(arg, int):
            values.append(arg)
            kind = 0 if special == 0 else 1 if arg == 1 else 2 if special == ALL and arg % 16 == 0 else 0
            kinds.append(kind if -BIG <= arg < BIG else (kind, arg < 1 << 63, "64 bits"))
        elif type(arg) is torch.Tensor or isinstance(arg, torch.Tensor):  # the first is the faster question
            address = arg.data_ptr()
            values.append(address)
            kinds += arg.dtype, special == ALL and address % 16 == 0
        elif isinstance(arg, tuple):  # Triton specialises what is in a tuple whatever its parameter says
            leaf = arg
            while isinstance(leaf, tuple):
                leaf = leaf[0]
            if isinstance(leaf, int):
                values.append(arg)
                kinds.append(_numbers(arg))
            else:
                inner: list[Any] = []
                _classify(arg, repeat(ALL), inner, kinds)
                values.append(tuple(inner))
                kinds.append(len(arg))
        else:
            values.append(arg)
            kinds.append(type(arg))
