"""Block tables on the device: the entries of each format, in order, whatever the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvg_paged.kernels.block_table import BlockTable


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
