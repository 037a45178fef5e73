"""Block tables on the device: the entries of each format, in order, whatever the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvg_paged.kernels import table_memory
from qvg_paged.kernels.block_table import BlockTable, FormatGroup
from qvg_paged.kernels.table_memory import KEPT, SHAPES, TableMemory


@given(st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=5))
def test_groups_hold_each_formats_entries_sequence_by_sequence(sequences: list[list[int]]) -> None:
    formats = tuple(fmt for sequence in sequences for fmt in sequence)
    count = len(formats)
    indptr = tuple(sum(map(len, sequences[:b])) for b in range(len(sequences) + 1))
    table = BlockTable(
        pages=tuple(range(100, 100 + count)), codebooks=tuple(-i for i in range(count)), formats=formats,
        positions=tuple(i + 0.5 for i in range(count)), indptr=indptr, device=torch.device("cpu"),
    )  # fmt: skip
    assert set(table.groups) == set(formats)
    for fmt, group in table.groups.items():
        entries = [i for i, f in enumerate(formats) if f == fmt]
        assert group.order == tuple(entries)
        assert group.pages.tolist() == [table.pages[i] for i in entries]
        assert group.codebooks.tolist() == [table.codebooks[i] for i in entries]
        assert group.positions.tolist() == [table.positions[i] for i in entries]
        assert group.host_indptr == tuple(sum(i < end for i in entries) for end in indptr)
        assert tuple(group.indptr.tolist()) == group.host_indptr
        assert {group.pages.dtype, group.codebooks.dtype, group.indptr.dtype} == {torch.int32}
        assert group.positions.dtype is torch.float32


def test_planes_are_aligned_so_that_lengths_do_not_change_what_is_compiled() -> None:
    for count in range(1, 9):
        table = BlockTable(
            pages=tuple(range(count + 3)), codebooks=(-1,) * (count + 3), formats=(0,) * 3 + (1,) * count,
            positions=(0.0,) * (count + 3), indptr=(0, count + 3), device=torch.device("cpu"),
        )  # fmt: skip
        base = table.groups[0].pages.data_ptr() % 16
        for group in table.groups.values():
            planes = (group.pages, group.codebooks, group.positions, group.indptr)
            assert {plane.data_ptr() % 16 for plane in planes} == {base}


def test_a_cuda_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    table = BlockTable((1,), (-1,), (0,), (0.0,), (0, 1), torch.device("cuda"))
    assert table.device == torch.device("cuda", 1)


def of_one(memory: TableMemory, first: int, entries: int = 5) -> BlockTable:
    formats = (1, *[0] * (entries - 1))
    return BlockTable.of_one(tuple(range(first, first + entries)), (-1,) * entries, formats, (0.5,) * entries, memory)


def address(group: FormatGroup) -> int:
    return group.pages.data_ptr()


def test_a_table_takes_the_memory_of_one_of_its_shape_that_is_done_with() -> None:
    memory = TableMemory(torch.device("cpu"))
    first = of_one(memory, 10)
    place = address(first.groups[0])
    open_beside_it = of_one(memory, 20)
    assert address(open_beside_it.groups[0]) != place
    first.cache["what attention keeps"] = torch.zeros(1)
    first.retire(idle=True)
    assert not first.cache
    longer, second = of_one(memory, 30, entries=6), of_one(memory, 40)
    assert address(longer.groups[0]) != place
    assert address(second.groups[0]) == place
    assert second.groups[0].pages.tolist() == [41, 42, 43, 44]
    assert second.groups[0].positions.tolist() == [0.5] * 4
    assert first.groups[0].pages.tolist() == [11, 12, 13, 14], "who asks again gets numbers of its own"
    assert open_beside_it.groups[0].pages.tolist() == [21, 22, 23, 24]


def test_memory_that_the_device_may_still_read_is_not_used_again() -> None:
    memory = TableMemory(torch.device("cpu"))
    first = of_one(memory, 10)
    kept = first.groups[0].pages
    first.retire(idle=False)
    assert of_one(memory, 20).groups[0].pages.tolist() == [21, 22, 23, 24]
    assert kept.tolist() == [11, 12, 13, 14]


def test_a_table_that_nobody_has_asked_for_gives_nothing_back() -> None:
    memory = TableMemory(torch.device("cpu"))
    of_one(memory, 10).retire(idle=True)
    assert not memory._free


def test_memory_is_used_again_only_on_the_stream_it_was_allocated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it would go back to that stream while others still read it."""
    memory = TableMemory(torch.device("cpu"))
    first = of_one(memory, 10)
    place = address(first.groups[0])
    first.retire(idle=True)
    with monkeypatch.context() as other:
        other.setattr(table_memory, "_stream", lambda _: 7)
        assert address(of_one(memory, 20).groups[0]) != place
    assert address(of_one(memory, 30).groups[0]) == place


def test_memory_of_few_tables_is_kept() -> None:
    memory = TableMemory(torch.device("cpu"))
    tables = [of_one(memory, 10) for _ in range(KEPT + 3)]
    for table in tables:
        assert table.groups
    for table in tables:
        table.retire(idle=True)
    assert list(map(len, memory._free.values())) == [KEPT]
    for entries in range(1, SHAPES + 3):
        table = of_one(memory, 0, entries)
        assert table.groups[1].pages.tolist() == [0]
        table.retire(idle=True)
    assert len(memory._free) <= SHAPES
