"""How the staged path divides its workspace, and with that a call."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from qvg_paged.kernels import fp8_attention, staged_decode
from qvg_paged.kernels.block_table import BlockTable
from qvg_paged.kernels.dense_attention import CUDNN_QUERIES
from qvg_paged.kernels.errors import ArgumentError
from qvg_paged.kernels.layout import GRANULE, PageLayout, PartLayout, align
from qvg_paged.kernels.partials import PENDING, slot_nbytes
from qvg_paged.kernels.rope import RoPESpec
from qvg_paged.kernels.slices import Cohort, Room, cohorts
from qvg_paged.kernels.staged_decode import decoded_page_nbytes

__all__ = ["SLOTS", "Plan", "make_plan", "running_nbytes"]

SLOTS = 4
"""Partial results of FP8 attention that are kept at once, if they fit a third of the workspace."""
ALONE_ROWS = 512
"""From this many query rows a KV head on, a sequence goes through FP8 alone: shares of its keys fill the machine, and a
batch would only make slices short and partial results large (8 sequences of 1,560 queries took 36 % longer)."""
DENSE_ALONE_ROWS = 4096
"""The same for dense kernels, whose blocks of query rows fill the machine later."""


@dataclass(frozen=True)
class Plan:
    """Slices of every cohort and where they go.

    Attributes:
        cohorts: the slices.
        scratch: bytes of the workspace for decoded pages; what follows them is for partial results.
        halves: slices take the halves of the scratch in turns, so that one is decoded while another is attended to.
        capacity: slices take the two ends of a scratch of so many pages in turns instead, if not 0.
        running: what follows the scratch begins with room for a running output.
        narrow: multiprocessors to decode on, of those that have a tile less to attend to; 0 if these are too few.
    """

    cohorts: tuple[Cohort, ...]
    scratch: int
    halves: bool = False
    capacity: int = 0
    running: bool = True
    narrow: int = 0

    @property
    def widest(self) -> int:
        """Most pages of a slice."""
        return max((piece.count for cohort in self.cohorts for piece in cohort.slices), default=0)


CUDNN_TILE = 128
"""Query rows of a tile of cuDNN, whose programs take tile after tile, one program a multiprocessor."""
SPARE_PER_HEAD = 1.8
"""Decoding some keys of a head takes so many multiprocessors as long as attention to them takes for a tile."""


def make_plan(
    q: torch.Tensor,
    table: BlockTable,
    layouts: Sequence[PageLayout],
    cu_queries: tuple[int, ...],
    rope: RoPESpec | None,
    nbytes: int,
    fp8: bool,
    keeps: bool,
) -> Plan:
    """Cut a call into slices for a workspace of `nbytes` bytes.

    Args:
        q, table, layouts, cu_queries, rope: of the call.
        nbytes: bytes of the workspace.
        fp8: attend to quantised pages in FP8.
        keeps: decoding goes on between calls.

    Raises:
        ArgumentError: the workspace is too small.
    """
    part, page_nbytes = layouts[0].key, decoded_page_nbytes(layouts[0].key, q.dtype)
    longest = q[: max(end - begin for begin, end in pairwise(cu_queries))]
    together, ahead = _together(q.device), _together(q.device) and not keeps

    def cut(room: Room, batched: bool) -> tuple[Cohort, ...]:
        return cohorts(table, cu_queries, rope, replace(room, lead=ahead, last=_dense(table, layouts)), batched)

    formats = frozenset(f for f in table.groups if fp8 and fp8_attention.reads(layouts[f]))
    alone = len(longest) * q.shape[1] >= (ALONE_ROWS if formats else DENSE_ALONE_ROWS) * part.heads
    # Where the outputs of the whole batch find no room, its sequences go one after another, too.
    for batched, rows in [(True, q)] * (together and not alone) + [(False, longest)] * (together or fp8):
        # Few partial results of the same sequences are merged at once, without a running output.
        for running in (0, running_nbytes(rows)):
            room, half, slots = _fp8_room(rows, part, nbytes - running, formats, table.batch if batched else 1)
            if room is not None:
                plan = Plan(cut(room, batched), 2 * half, halves=True, running=running > 0)
                if running or all(_merged_at_once(cohort, q, cu_queries, part, slots) for cohort in plan.cohorts):
                    return plan
        for running in (0, running_nbytes(rows)) if together else ():
            scratch = (nbytes - running) // GRANULE * GRANULE
            capacity = max(0, scratch) // page_nbytes
            if capacity > 1:
                room = Room(capacity // 2, capacity=capacity)
                narrows = len(rows) == len(longest) and all(layouts[f].is_uniform for f in table.groups)
                narrow = _spare(q, cu_queries, part) if narrows else 0
                plan = Plan(cut(room, batched), scratch, True, capacity, running > 0, narrow)
                if running or all(_merged_at_once(cohort, q, cu_queries, part) for cohort in plan.cohorts):
                    return plan
    if nbytes >= page_nbytes:
        plan = Plan(cohorts(table, cu_queries, rope, Room(nbytes // page_nbytes), together), nbytes)
        if all(len(cohort.slices) <= 1 for cohort in plan.cohorts):
            return plan
    scratch = (nbytes - running_nbytes(longest)) // GRANULE * GRANULE
    if scratch < page_nbytes:
        raise ArgumentError(
            f"workspace: expected at least {align(page_nbytes, GRANULE) + running_nbytes(longest)} bytes (K and V of "
            f"one decoded page, running outputs of one sequence), got {nbytes}"
        )
    return Plan(cohorts(table, cu_queries, rope, Room(scratch // page_nbytes), False), scratch)


def _together(device: torch.device) -> bool:
    """Whether equal sequences go through one call, and decoding runs ahead."""
    return device.type == "cuda"


def _spare(q: torch.Tensor, cu_queries: tuple[int, ...], part: PartLayout) -> int:
    """Half of the multiprocessors that have a tile less than the others to attend to; 0 if decoding takes longer."""
    if q.device.type != "cuda" or part.head_dim != CUDNN_TILE:
        return 0
    group, count = q.shape[1] // part.heads, torch.cuda.get_device_properties(q.device).multi_processor_count
    rows = [(end - begin) * group for begin, end in pairwise(cu_queries) if end > begin]
    spare = min((-(-n // CUDNN_TILE) * -part.heads % count for n in rows), default=0)
    return spare // 2 if min(rows, default=0) >= CUDNN_QUERIES and spare >= SPARE_PER_HEAD * part.heads else 0


def _dense(table: BlockTable, layouts: Sequence[PageLayout]) -> frozenset[int]:
    """Formats of unquantised pages."""
    return frozenset(fmt for fmt in table.groups if layouts[fmt].format.is_dense)


def _merged_at_once(
    cohort: Cohort, q: torch.Tensor, cu_queries: tuple[int, ...], part: PartLayout, slots: int = 0
) -> bool:
    """Whether all partial results of a cohort can wait for each other, those in FP8 in so many slots."""
    first, group = cohort.sequences[0], q.shape[1] // part.heads
    rows = (cu_queries[first + 1] - cu_queries[first]) * group
    fp8 = sum(
        fp8_attention.num_splits(
            len(piece.members) * part.heads, rows, piece.count // len(piece.members) * part.tokens,
            fp8_attention.launch_shape(part.head_dim), q.device,
        )
        for piece in cohort.slices if piece.fp8
    )  # fmt: skip
    others = sum(not piece.fp8 for piece in cohort.slices)
    return fp8 <= slots and fp8 + others <= PENDING and len({piece.members for piece in cohort.slices}) <= 1


def _fp8_room(
    q: torch.Tensor, part: PartLayout, nbytes: int, formats: frozenset[int], sequences: int
) -> tuple[Room | None, int, int]:
    """Pages of a slice, bytes of half the scratch and slots, if `formats` go to FP8 and decoding runs one ahead.

    None if there is no such format, no room for partial results, or none for a page in a half.
    """
    slot = slot_nbytes(q.shape[0] * q.shape[1], q.shape[2], q.dtype)
    slots = min(SLOTS, nbytes // 3 // slot)
    half = max(0, nbytes - slots * slot) // 2 // GRANULE * GRANULE
    pages = half // decoded_page_nbytes(part, q.dtype)
    padding = fp8_attention.scratch_nbytes(sequences * part.heads, 1, part.head_dim, staged_decode.FP8_DTYPE)
    fp8_pages = max(0, half - padding) // decoded_page_nbytes(part, staged_decode.FP8_DTYPE)
    if not (formats and slots and pages and fp8_pages):
        return None, half, slots
    return Room(pages, fp8_pages, formats), half, slots


def running_nbytes(q: torch.Tensor) -> int:
    """Bytes of running outputs of `q`, in float32."""
    return align(q.numel() * 4, GRANULE)
