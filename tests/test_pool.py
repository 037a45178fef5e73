"""The slab pool: all or nothing, no fragmentation beyond the promise, every byte overwritten when it comes back."""

import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvg_paged import ConfigError, FreeFill, IntegrityError, OutOfMemoryError, StaleHandleError, Window
from qvg_paged.fence import Fence
from qvg_paged.kernels.layout import GRANULE
from qvg_paged.pool import SlabGeometry, SlabPool, Slot, byte_runs
from qvg_paged.slabs import GENERATIONS, PLACE, place_runs
from qvg_paged.timeline import Demand, Timeline

CPU = torch.device("cpu")
DONE = Fence(None)


class Late(Fence):
    """A fence that passes when the test says so, and notes who waited for it."""

    def __init__(self) -> None:
        super().__init__(None)
        self.done = False
        self.waited = 0

    def passed(self) -> bool:
        return self.done

    def order_after(self) -> None:
        self.waited += 1


def make_pool(sizes: tuple[int, ...] = (1024, 256), slab: int = 2048, slabs: int = 4) -> SlabPool:
    return SlabPool(SlabGeometry(slab, slabs), sizes, CPU, FreeFill.POISON)


def test_slots_are_contiguous_aligned_and_disjoint() -> None:
    pool = make_pool()
    slots = pool.allocate(1024, 3, "t") + pool.allocate(256, 9, "t")
    ranges = sorted((slot.id * 256, slot.id * 256 + slot.nbytes) for slot in slots)
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert pool.used_nbytes == pool.peak_nbytes == 3 * 1024 + 9 * 256
    assert {slot.tenant for slot in slots} == {"t"}
    assert len({slot.generation for slot in slots}) == len(slots)
    pool.check_integrity()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_several_slots_go_back_at_once_or_not_at_all(count: int) -> None:
    pool = make_pool()
    slots, gone = pool.allocate(1024, count, "t"), pool.allocate(256, 1, "t")[0]
    pool.free(gone, DONE)
    live = pool.live()
    with pytest.raises(StaleHandleError, match=f"generation {gone.generation}"):
        pool.give_back(1024, [slot.generation for slot in [*slots, gone]], "t", DONE)
    assert pool.live() == live
    pool.give_back(1024, [slot.generation for slot in slots], "t", DONE)
    pool.give_back(1024, [], "u", DONE)
    assert pool.live() == {}
    pool.reclaim(wait=False)
    assert pool.used_nbytes == 0
    assert pool.free_nbytes == 4 * 2048
    pool.check_integrity()


def test_what_does_not_fit_takes_nothing_and_says_how_much_was_free() -> None:
    pool = make_pool()
    pool.allocate(1024, 3, "t")
    live = pool.live()
    with pytest.raises(OutOfMemoryError, match="1 slabs of 2048 bytes short of 4") as caught:
        pool.allocate(1024, 6, "t")
    assert (caught.value.requested, caught.value.available) == (6 * 1024, 2 * 2048)
    assert pool.live() == live
    pool.check_integrity()
    assert len(pool.allocate(1024, 5, "t")) == 5


def test_none_are_none_whatever_came_back() -> None:
    pool = make_pool()
    for slot in pool.allocate(1024, 2, "t"):
        pool.free(slot, DONE)
    assert pool.allocate(1024, 0, "t") == []
    pool.check_integrity()


def test_what_came_back_is_taken_first_and_leaves_no_slab_half_empty() -> None:
    pool = make_pool(slabs=3)
    first = pool.allocate(1024, 4, "t")
    for slot in first[1:3]:
        pool.bytes_of(slot).fill_(7)
        pool.free(slot, DONE)
    again = pool.allocate(1024, 3, "u")
    assert {slot.id for slot in first[1:3]} < {slot.id for slot in again}
    assert all(pool.bytes_of(slot).eq(0xFF).all() for slot in again)
    assert not {slot.generation for slot in again} & {slot.generation for slot in first}
    assert (pool.used_nbytes, pool.peak_nbytes, pool.free_nbytes) == (5 * 1024, 5 * 1024, 0)
    pool.check_integrity()


def test_a_slab_cut_for_another_size_and_back_names_its_places_anew() -> None:
    pool, seen = make_pool(slabs=1), set[int]()
    for size in (1024, 256, 1024, 1024, 256):
        slots = pool.allocate(size, 2048 // size, "t")
        assert not seen & {slot.generation for slot in slots}
        seen |= {slot.generation for slot in slots}
        for slot in slots:
            pool.free(slot, DONE)


@pytest.mark.parametrize("count", [1, 8])
def test_memory_on_its_way_back_makes_no_peak(count: int) -> None:
    pool = make_pool()
    for slot in pool.allocate(1024, 2, "t"):
        pool.free(slot, DONE)
    pool.allocate(256, count, "t")
    assert (pool.used_nbytes, pool.peak_nbytes) == (256 * count, 2048)
    pool.check_integrity()


def test_room_is_counted_over_all_sizes_of_a_request() -> None:
    pool = make_pool(slabs=2)
    pool.require({1024: 2, 256: 8})
    with pytest.raises(OutOfMemoryError):
        pool.require({1024: 2, 256: 9})
    pool.require({1024: 0, 256: 16})


def test_freeing_twice_is_an_error_the_second_time_even_if_the_place_is_in_use_again() -> None:
    pool = make_pool()
    (slot,) = pool.allocate(1024, 1, "t")
    pool.free(slot, DONE)
    with pytest.raises(StaleHandleError, match=f"generation {slot.generation}"):
        pool.free(slot, DONE)
    pool.reclaim(wait=False)
    (again,) = pool.allocate(1024, 1, "u")
    assert again.id == slot.id
    assert again.generation != slot.generation
    for use in (pool.check, lambda old: pool.free(old, DONE)):
        with pytest.raises(StaleHandleError):
            use(slot)
    pool.check(again)
    pool.check_integrity()


def test_returned_memory_is_overwritten_before_anyone_gets_it() -> None:
    for fill, byte in ((FreeFill.POISON, 0xFF), (FreeFill.ZERO, 0)):
        pool = SlabPool(SlabGeometry(1024, 1), [1024], CPU, fill)
        assert (pool.buffer == byte).all(), "from the start, too"
        (slot,) = pool.allocate(1024, 1, "t")
        pool.bytes_of(slot).fill_(7)
        pool.free(slot, DONE)
        (again,) = pool.allocate(1024, 1, "u")
        assert (pool.bytes_of(again) == byte).all()


def test_memory_is_reused_only_once_its_fence_has_passed() -> None:
    pool = make_pool(slabs=1)
    first, second = pool.allocate(1024, 2, "t")
    fence = Late()
    pool.free(first, fence)
    pool.reclaim(wait=False)
    assert pool.used_nbytes == 2048, "memory on its way back still counts"
    assert not pool.bytes_of(first).eq(0xFF).all() or fence.waited == 0
    with pytest.raises(StaleHandleError):
        pool.check(first)
    pool.check_integrity()
    fence.done = True
    pool.reclaim(wait=False)
    assert (pool.used_nbytes, fence.waited) == (1024, 0)
    pool.check(second)


def test_a_request_that_needs_memory_on_its_way_back_orders_itself_behind_the_fence() -> None:
    pool = make_pool(slabs=1)
    first, _ = pool.allocate(1024, 2, "t")
    fence = Late()
    pool.free(first, fence)
    (again,) = pool.allocate(1024, 1, "t")
    assert again.id == first.id
    assert fence.waited == 1


def test_a_pool_is_cut_and_made_longer_and_what_lies_in_it_stays() -> None:
    pool = make_pool()
    (slot,) = pool.allocate(1024, 1, "t")
    pool.bytes_of(slot).fill_(7)
    for slabs in (2, 5):
        pool.resize(slabs)
        assert (pool.num_slabs, pool.geometry.num_slabs, pool.buffer.numel()) == (slabs, slabs, slabs * 2048)
        assert pool.bytes_of(slot).eq(7).all()
        pool.check_integrity()
    assert pool.buffer[2 * 2048 :].eq(0xFF).all(), "new memory reads as returned memory does"
    assert len(pool.allocate(1024, 9, "t")) == 9
    with pytest.raises(OutOfMemoryError):
        pool.allocate(1024, 1, "t")
    pool.check_integrity()


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 40),
    st.lists(st.tuples(st.sampled_from([256, 768, 2048]), st.integers(-6, 6)), max_size=80),
    st.randoms(use_true_random=False),
)
def test_a_size_never_holds_more_slabs_than_its_peak_count_needs(
    slabs: int, moves: list[tuple[int, int]], rng: random.Random
) -> None:
    """Whatever is freed in whatever order: this is what lets admission by worst case promise memory."""
    geometry = SlabGeometry(4096, slabs)
    pool = SlabPool(geometry, (256, 768, 2048), CPU)
    held: dict[int, list[Slot]] = {256: [], 768: [], 2048: []}
    peak: Counter[int] = Counter()
    for size, count in moves:
        for slot in rng.sample(held[size], min(max(-count, 0), len(held[size]))):
            held[size].remove(slot)
            pool.free(slot, DONE)
        if count > 0:
            counts = Counter({s: max(peak[s], len(held[s]) + (count if s == size else 0)) for s in held})
            if geometry.slabs_for(counts) > slabs:
                continue
            held[size] += pool.allocate(size, count, "t")  # promised: must not raise
            peak = counts
        pool.reclaim(wait=False)
        in_use = slabs - pool.free_nbytes // 4096
        assert in_use <= geometry.slabs_for(peak)
        assert pool.used_nbytes == sum(size * len(slots) for size, slots in held.items())
        pool.check_integrity()
    for slots in held.values():
        for slot in slots:
            pool.free(slot, DONE)
    pool.reclaim(wait=False)
    assert pool.free_nbytes == geometry.nbytes, "every slab comes back"
    assert not pool.used_nbytes


def test_a_pool_too_small_for_a_slab_of_each_size_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="expected a pool of at least 8192 bytes"):
        SlabGeometry.choose([4096, 256], 8191)
    assert SlabGeometry.choose([4096, 256], 8192).num_slabs == 2


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 400), min_size=1, max_size=3), st.integers(400, 60_000))
def test_the_slab_size_wastes_least(units: set[int], pool_units: int) -> None:
    """Counted from the pool: what slabs leave unused, four partly filled slabs a size, and what is left at its end."""
    sizes, nbytes = sorted(unit * GRANULE for unit in units), pool_units * GRANULE
    if len(sizes) * sizes[-1] > nbytes:
        return

    def wasted(slab: int) -> float:
        unused = sum(slab % size for size in sizes) / (len(sizes) * slab)
        left = nbytes - nbytes // slab * slab
        return unused + (4 * len(sizes) * slab + left) / nbytes

    chosen = SlabGeometry.choose(sizes, nbytes)
    assert chosen.num_slabs == nbytes // chosen.slab_nbytes
    others = {size * count for size in sizes for count in range(1, 65)}
    fits = [slab for slab in others if slab >= sizes[-1] and slab * len(sizes) <= nbytes]
    assert wasted(chosen.slab_nbytes) == pytest.approx(min(map(wasted, fits)))


def test_damage_to_the_books_is_found() -> None:
    def free_list(pool: SlabPool) -> None:
        pool._free_slabs.append(pool._free_slabs[0])

    def lost(pool: SlabPool) -> None:
        pool._free_slabs.pop()

    def count(pool: SlabPool) -> None:
        pool._classes[256].free_slots += 1

    def listed(pool: SlabPool) -> None:
        pool._classes[256].with_room.clear()

    def used(pool: SlabPool) -> None:
        pool.used_nbytes += 1

    def twice(pool: SlabPool) -> None:
        room = pool._classes[256].free[1]
        room[0] = room[1]

    def owners(pool: SlabPool) -> None:
        pool._free_slabs.append(1)

    def size(pool: SlabPool) -> None:
        slot = next(s for s in pool.live().values() if s.nbytes == 1024)
        pool._live["t"].remove(slot.generation)
        pool._live["t"].add(slot.generation + (1 << PLACE))  # where no object of that size begins

    def nowhere(pool: SlabPool) -> None:
        pool._live["t"].add(24 << PLACE)

    def cut(pool: SlabPool) -> None:
        pool._cut[0] = pool._cut[1]

    for damage in (free_list, lost, count, listed, used, twice, owners, size, nowhere, cut):
        pool = make_pool()
        pool.allocate(1024, 1, "t")
        pool.allocate(256, 1, "t")
        pool.check_integrity()
        damage(pool)
        with pytest.raises(IntegrityError, match="1 slabs are lost" if damage is lost else None):
            pool.check_integrity()


GEOMETRIES = {
    # bytes of an unquantised page, a 2-bit page and a codebook, all layers; tokens, heads, head_dim, layers, centroids
    "1,560 tokens, 12 heads of 128, 30 layers": (1560, 12, 128, 30, 256),
    "880 tokens, 16 heads of 256, 40 layers": (880, 16, 256, 40, 256),
    "64 tokens, 4 heads of 64, 8 layers": (64, 4, 64, 8, 64),
}


def _sizes(tokens: int, heads: int, dim: int, layers: int, centroids: int) -> tuple[int, int, int]:
    def up(nbytes: int) -> int:
        return -(-nbytes // 256) * 256

    row = dim // 4 + dim // 64 + 1
    return (
        up(layers * 2 * tokens * heads * dim * 2),
        up(layers * 2 * tokens * heads * row),
        up(layers * 2 * heads * dim * (centroids + 1) * 2),
    )


class Churn:
    """Streams of random windows on a pool of one geometry, their spans turning from unquantised to quantised."""

    SPAN, CHUNK = 12, 3

    def __init__(self, name: str) -> None:
        self.rng = random.Random(name)
        self.sizes = self.dense, self.quantised, self.book = _sizes(*GEOMETRIES[name])
        self.nbytes = 300 * self.dense
        self.geometry = SlabGeometry.choose(self.sizes, self.nbytes)
        self.pool = SlabPool(self.geometry, self.sizes, torch.device("meta"))
        self.streams: dict[int, tuple[Timeline, int, dict[int, Slot], dict[int, tuple[Slot, set[int]]]]] = {}

    @property
    def rounding(self) -> float:
        """The largest share of a slab that one of the sizes leaves unused."""
        slab = self.geometry.slab_nbytes
        return max(1 - (slab // size) * size / slab for size in self.sizes)

    def timeline(self) -> Timeline:
        window = Window(sink_frames=self.rng.randint(0, 3), recent_frames=self.rng.randint(self.SPAN, 90))
        return Timeline(window, self.SPAN)

    def counts(self, demand: Demand) -> dict[int, int]:
        return {
            self.dense: demand.dense_pages, self.quantised: demand.quantised_pages, self.book: demand.codebooks
        }  # fmt: skip

    def nbytes_of(self, demand: Demand) -> int:
        return sum(size * count for size, count in self.counts(demand).items())

    def next_chunk(self, key: int) -> Demand:
        timeline, committed, _, _ = self.streams[key]
        closing = timeline.closed_spans(committed + self.CHUNK) - timeline.closed_spans(committed)
        return Demand(self.CHUNK, closing * self.SPAN, closing)

    def advance(self, key: int) -> None:
        timeline, committed, pages, books = self.streams[key]
        closed, committed = timeline.closed_spans(committed), committed + self.CHUNK
        scratch = self.pool.allocate(self.dense, self.CHUNK, "t")
        pages.update(zip(range(committed - self.CHUNK, committed), scratch, strict=True))
        for index in range(closed, timeline.closed_spans(committed)):
            books[index] = (self.pool.allocate(self.book, 1, "t")[0], set(timeline.span(index)))
            for frame, slot in zip(
                timeline.span(index), self.pool.allocate(self.quantised, self.SPAN, "t"), strict=True
            ):
                self.pool.free(pages[frame], DONE)
                pages[frame] = slot
        kept = set(timeline.kept(committed))
        for frame in [frame for frame in pages if frame not in kept]:
            self.pool.free(pages.pop(frame), DONE)
        for index in [index for index, (_, frames) in books.items() if not frames & kept]:
            self.pool.free(books.pop(index)[0], DONE)
        self.streams[key] = (timeline, committed, pages, books)

    def close(self, key: int) -> None:
        _, _, pages, books = self.streams.pop(key)
        for slot in [*pages.values(), *(slot for slot, _ in books.values())]:
            self.pool.free(slot, DONE)

    def report(self, what: str, waste: list[float]) -> tuple[float, float]:
        mean, worst = sum(waste) / len(waste), max(waste)
        print(  # noqa: T201 - the measured numbers, with pytest -s
            f"\n{what}: {self.geometry.num_slabs} slabs of {self.geometry.slab_nbytes / self.dense:.2f} dense pages, "
            f"{len(waste)} refusals, waste mean {mean:.1%}, worst {worst:.1%}, rounding {self.rounding:.1%}"
        )
        assert len(waste) >= 30
        return mean, worst


@pytest.mark.parametrize("name", GEOMETRIES)
def test_admission_by_worst_case_leaves_at_most_five_percent_and_rounding_unpromised(name: str) -> None:
    """Streams are let in while their worst cases fit; no chunk of theirs is ever refused."""
    churn = Churn(name)
    worst: dict[int, Demand] = {}
    frames: dict[int, int] = {}
    waste = []
    candidate = churn.timeline()
    demand = candidate.worst_demand(churn.CHUNK)
    for step in range(2000):
        promised = sum(worst.values(), Demand())
        if churn.geometry.slabs_for(churn.counts(promised + demand)) <= churn.geometry.num_slabs:
            churn.streams[step] = (candidate, 0, {}, {})
            worst[step], frames[step] = demand, churn.rng.randint(6, 200)
            candidate = churn.timeline()
            demand = candidate.worst_demand(churn.CHUNK)
        else:
            left = churn.nbytes - churn.nbytes_of(promised + demand)
            waste.append(max(0, left) / churn.nbytes)
        key = churn.rng.choice(list(churn.streams))
        churn.advance(key)
        if churn.streams[key][1] >= frames[key]:
            churn.close(key)
            del worst[key], frames[key]
        if step % 250 == 0:
            churn.pool.check_integrity()
    _, most = churn.report(f"admission, {name}", waste)
    assert most <= 0.05 + churn.rounding


@pytest.mark.parametrize("name", GEOMETRIES)
def test_without_admission_refusals_leave_on_average_four_slabs_per_size_and_rounding(name: str) -> None:
    """No admission: streams grow until the pool refuses one, which then goes, whole. Waste is what a refusal leaves
    on the table: the share of the pool that neither live objects nor the refused request would have filled.
    """
    churn = Churn(name)
    waste = []
    for step in range(3000):
        if not churn.streams or (len(churn.streams) < 40 and churn.rng.random() < 0.3):
            churn.streams[step] = (churn.timeline(), 0, {}, {})
        key = churn.rng.choice(list(churn.streams))
        need = churn.next_chunk(key)
        try:
            churn.pool.require(churn.counts(need))
            churn.advance(key)
        except OutOfMemoryError:
            waste.append(max(0, churn.nbytes - churn.pool.used_nbytes - churn.nbytes_of(need)) / churn.nbytes)
            churn.close(key)
        if step % 250 == 0:
            churn.pool.check_integrity()
    mean, _ = churn.report(f"no admission, {name}", waste)
    assert mean <= 4 * len(churn.sizes) / churn.geometry.num_slabs + churn.rounding


def test_neighbours_are_one_run_of_bytes() -> None:
    slots = [Slot(id=place, nbytes=2 * GRANULE, tenant="a", generation=0) for place in (8, 2, 4, 16)]
    found = byte_runs(slots)
    assert found == [(2 * GRANULE, 6 * GRANULE), (8 * GRANULE, 10 * GRANULE), (16 * GRANULE, 18 * GRANULE)]
    assert byte_runs([]) == []


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.sets(st.integers(0, 30)))
def test_runs_are_longest_stretches_without_a_gap_but_the_rest_of_a_slab(
    units: int, slots: int, rest: int, taken: set[int]
) -> None:
    slab = units * slots + rest
    places = [index // slots * slab + index % slots * units for index in sorted(taken)]
    handles = [(place << PLACE) + 7 * place for place in places]
    filled = {granule for place in places for granule in range(place, place + units)}
    between = {i // slots * slab + units * slots for i in taken if i % slots == slots - 1 and i + 1 in taken}
    rests = {granule for first in between for granule in range(first, first + rest)}
    for joins in (False, True):
        runs = place_runs(handles, units, slab, rest) if joins else place_runs(handles, units)
        assert {granule for run in runs for granule in range(*run)} == (filled | rests if joins else filled)
        assert all(end < start for (_, end), (start, _) in pairwise(runs))


def test_the_rest_of_a_slab_is_overwritten_with_what_lies_on_both_sides_of_it() -> None:
    for fill, joined in ((FreeFill.ZERO, [(0, 7)]), (FreeFill.POISON, [(0, 3), (4, 7)])):
        pool = SlabPool(SlabGeometry(1024, 3), [768], CPU, fill)
        slots = pool.allocate(768, 2, "t")
        handles = [slot.generation for slot in slots]
        assert pool.stretches(768, handles) == joined
        pool.buffer.fill_(7)
        pool.give_back(768, handles, "t", DONE)
        pool.take(768, 2, "t")
        assert pool.buffer[: 7 * GRANULE].eq(pool.buffer[0]).all()
        assert pool.buffer[7 * GRANULE :].eq(7).all(), "what nobody has returned stays"


def test_views_of_a_stretch_are_kept_and_made_anew_when_memory_is_another() -> None:
    pool = make_pool()
    part = pool.stretch(torch.int32, 4, 12)
    assert pool.stretch(torch.int32, 4, 12) is part
    part.fill_(3)
    assert pool.buffer[16:48].view(torch.int32).eq(3).all()
    pool.resize(3)
    moved = pool.stretch(torch.int32, 4, 12)
    moved.fill_(5)
    assert pool.buffer[16:48].view(torch.int32).eq(5).all()
    assert part.eq(3).all()


def test_more_stretches_than_are_kept_are_forgotten_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvg_paged.slab_memory.KEPT", 2)
    pool = SlabPool(SlabGeometry(1024, 8), [1024], CPU)
    slots = pool.allocate(1024, 8, "t")
    for slot in slots[::2]:
        pool.bytes_of(slot).fill_(7)
        assert pool.stretch(torch.uint8, slot.id * GRANULE, slot.id * GRANULE + 1).item() == 7
        pool.free(slot, DONE)
    again = pool.allocate(1024, 4, "t")
    assert {slot.id for slot in again} == {slot.id for slot in slots[::2]}
    assert all(pool.bytes_of(slot).eq(0).all() for slot in again)


def test_generations_come_again_only_after_all_others() -> None:
    pool = make_pool()
    pool._generation = GENERATIONS - 1
    first, second = (pool.allocate(256, 8, "t") for _ in range(2))
    assert [slot.id for slot in first + second] == list(range(16))
    assert len({slot.generation for slot in first + second}) == 16
    pool.check_integrity()
