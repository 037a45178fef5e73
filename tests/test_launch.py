"""Launches that skip Triton's own: which kernel they take, with what arguments, and what can be repeated."""

import random
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction

from qvg_paged.kernels import launch as module
from qvg_paged.kernels.launch import launch, movable, overlapping, recorded

KERNELS = Path(module.__file__).parent


class Pair(NamedTuple):
    first: int
    second: int


def body(out, x, size, plain, unaligned, where, pieces, WIDTH: "tl.constexpr"):  # type: ignore[no-untyped-def]  # noqa: N803
    """Never compiled."""


class Compiled:
    """What was compiled, and launches of it."""

    def __init__(self, number: int) -> None:
        self.function, self.packed_metadata = number, f"metadata {number}"
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.launched.append(args)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A kernel whose compilations are noted."""
    made = JITFunction(body, do_not_specialize=["plain"], do_not_specialize_on_alignment=["unaligned"])
    compiled: list[Compiled] = []

    def run(*_: Any, warmup: bool, **__: Any) -> Compiled:
        assert warmup
        compiled.append(Compiled(len(compiled)))
        return compiled[-1]

    monkeypatch.setattr(made, "run", run)
    monkeypatch.setattr(made, "compiled", compiled, raising=False)
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 70 + device)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(module, "_compiled", {})
    return made


def arguments(**changed: Any) -> tuple[Any, ...]:
    x = torch.empty(64)
    given = {
        "out": x, "x": x, "size": 7, "plain": 7, "unaligned": 7, "where": Pair(7, 9), "pieces": (x, x)
    }  # fmt: skip
    return tuple({**given, **changed}.values())


def test_the_launcher_gets_the_grid_the_stream_and_addresses_in_order(kernel: Any) -> None:
    args = arguments(x=None)
    launch(kernel, (3, 2), *args, WIDTH=64, num_warps=4)
    (done,) = kernel.compiled
    address = args[0].data_ptr()
    expected = (address, None, 7, 7, 7, (7, 9), (address, address), 64)
    assert done.launched == [(3, 2, 1, 70, 0, "metadata 0", None, None, None, *expected)]


def test_a_kernel_is_compiled_once_per_specialisation_and_constant(kernel: Any) -> None:
    x = torch.empty(64)
    for args, constants in (
        (arguments(), {"WIDTH": 64}), (arguments(plain=1), {"WIDTH": 64}), (arguments(plain=32), {"WIDTH": 64}),
        (arguments(unaligned=32), {"WIDTH": 64}), (arguments(x=torch.empty(9)), {"WIDTH": 64}),
        (arguments(where=Pair(5, 3)), {"WIDTH": 64}),
    ):  # fmt: skip
        launch(kernel, (1,), *args, **constants)
    assert len(kernel.compiled) == 1
    others = (
        arguments(size=1), arguments(size=16), arguments(size=1 << 40), arguments(unaligned=1), arguments(out=x[1:]),
        arguments(x=x.half()), arguments(x=None), arguments(where=Pair(1, 9)), arguments(where=Pair(7, 16)),
        arguments(pieces=(x, x[1:])), arguments(pieces=(x, x.half())),
    )  # fmt: skip
    for number, args in enumerate(others, 2):
        launch(kernel, (1,), *args, WIDTH=64)
        assert len(kernel.compiled) == number
    launch(kernel, (1,), *arguments(), WIDTH=32)
    launch(kernel, (1,), *arguments(), WIDTH=64, num_warps=8)
    assert len(kernel.compiled) == 3 + len(others)


def test_arguments_that_triton_tells_apart_are_told_apart() -> None:
    x, generator = torch.empty(64), random.Random(0)
    numbers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**40 + 1, 2**63]
    tensors = [x, x[1:], x[4:], x.half(), x.half()[1:], x.to(torch.uint8)[3:]]
    for special, aligned in product((False, True), repeat=2):
        flag = [[0, 0], [1, 2]][special][aligned]
        known: dict[Any, Any] = {}
        values: list[Any] = [*numbers, *tensors, True, False, None, 0.5]
        values += [tuple(generator.choices(numbers, k=2)) for _ in range(40)]
        values += [tuple(generator.choices(tensors, k=2)) for _ in range(20)]
        for value in values:
            kinds: list[Any] = []
            module._classify([value], [flag], [], kinds)
            theirs = native_specialize_impl(BaseBackend, value, False, special, aligned)
            assert known.setdefault(tuple(kinds), theirs) == theirs, value


def test_recorded_launches_are_repeated_on_the_stream_they_are_given(kernel: Any) -> None:
    with recorded() as outer:
        launch(kernel, (1,), *arguments(), WIDTH=64)
        with recorded() as inner:
            launch(kernel, (2,), *arguments(), WIDTH=64)
    launch(kernel, (3,), *arguments(), WIDTH=64)
    assert (len(outer), len(inner)) == (1, 1)
    (done,) = kernel.compiled
    outer[0](5)
    assert [launched[:4] for launched in done.launched] == [(n, 1, 1, 70) for n in (1, 2, 3)] + [(1, 1, 1, 5)]
    assert done.launched[0][4:] == done.launched[-1][4:]


def test_a_recorded_launch_can_be_moved_to_other_memory(kernel: Any) -> None:
    """Pointers into the given blocks follow them, whatever else is passed stays."""
    block, elsewhere = torch.zeros(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    inside = block[16:32].view(torch.float32)
    first = arguments(where=5, pieces=None)
    with recorded() as launches:
        launch(kernel, (2,), inside, *first[1:], WIDTH=64)
        launch(kernel, (2,), *arguments(), WIDTH=64)
    with pytest.raises(TypeError, match="tuples"):
        movable(launches[1], (block,))
    moved = movable(launches[0], (block, first[1]))
    assert moved is not None
    moved(9, (elsewhere.data_ptr(), 4096))
    before, after = kernel.compiled[0].launched
    assert after[:4] == (2, 1, 1, 9)
    assert after[9:11] == (elsewhere.data_ptr() + 16, 4096)
    assert after[11:] == before[11:]


def test_what_an_interpreter_ran_cannot_be_moved() -> None:
    assert movable(lambda _: None, ()) is None


def test_a_parameter_that_is_missing_is_told(kernel: Any) -> None:
    with pytest.raises(TypeError, match="pieces"):
        launch(kernel, (1,), *arguments()[:-1], WIDTH=64)


@pytest.mark.parametrize("name", ["_decode_triton", "_fp8_bounds_triton", "_fp8_decode_triton"])
def test_decoding_launches_nothing_that_could_not_be_repeated(name: str) -> None:
    source = (KERNELS / f"{name}.py").read_text()
    assert "launch(" in source
    assert not re.findall(r"_kernel\[|\.(zero_|fill_|copy_|index_copy_)\(", source)


@pytest.mark.parametrize(("capability", "overlaps"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_launches_overlap_where_a_kernel_can_wait_for_the_one_before(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], overlaps: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    overlapping.cache_clear()
    constants = overlapping(torch.device("cuda", 0))
    overlapping.cache_clear()
    assert constants == ({"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False})
    assert overlapping(torch.device("cpu")) == {"OVERLAP": False}
