"""Order of a side stream and its caller's, on streams that note what each of them knows to be done."""

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from qvg_paged.kernels import lookahead as module
from qvg_paged.kernels.lookahead import Lookahead, Step, staged

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """What was launched on a stream, and all that happened before whatever is launched next."""

    count = 0

    def __init__(self, *_: object, **__: object) -> None:
        FakeStream.count += 1
        self.cuda_stream = FakeStream.count
        self.device = DEVICE
        self.behind: set[str] = set()

    def launch(self, name: str) -> set[str]:
        before = set(self.behind)
        self.behind.add(name)
        return before

    def wait_event(self, event: "FakeEvent") -> None:
        self.behind |= event.behind

    def wait_stream(self, other: "FakeStream") -> None:
        self.behind |= other.behind


class FakeEvent:
    """All that had happened on a stream when it was last recorded there."""

    def __init__(self) -> None:
        self.behind: set[str] = set()

    def record(self, stream: FakeStream) -> None:
        self.behind = set(stream.behind)


class FakeCuda:
    """The parts of `torch.cuda` that order work."""

    def __init__(self) -> None:
        self.current = FakeStream()
        self.capturing = False

    def current_stream(self, _: torch.device) -> FakeStream:
        return self.current

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fake.is_current_stream_capturing)
    module._beside.cache_clear()
    yield fake
    module._beside.cache_clear()


class Halves:
    """Scratch of two halves, and what decoding leaves in them."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.seen: dict[str, set[str]] = {}
        self.streams: list[FakeStream] = []
        self.count = 0

    def step(self, name: str) -> Step:
        def decode(half: int, stream: FakeStream | None) -> None:
            assert stream is not None
            self.held[half] = name
            self.count += 1
            self.seen[name] = stream.launch(f"decode {name}")
            self.streams.append(stream)

        return Step(name, decode)  # type: ignore[arg-type]

    def attend(self, main: FakeStream, names: list[str], lookahead: Lookahead | None, follow: str | None) -> None:
        steps = [self.step(name) for name in names]
        with closing(staged(
            steps, DEVICE, ahead=True, lookahead=lookahead, follow=None if follow is None else self.step(follow)
        )) as turns:  # fmt: skip
            for i, half in turns:
                assert self.held[half] == names[i]
                assert f"decode {names[i]}" in main.launch(f"attend {names[i]}")


def test_a_half_is_decoded_ahead_and_only_behind_the_attention_that_read_it(cuda: FakeCuda) -> None:
    main, halves = cuda.current, Halves()
    steps = [halves.step(f"{i}") for i in range(5)]
    for i, _ in staged(steps, DEVICE, ahead=True):
        assert f"decode {i}" in main.launch(f"attend {i}")
    assert main not in halves.streams
    for i in range(2, 5):
        assert f"attend {i - 2}" in halves.seen[f"{i}"]
        assert f"attend {i - 1}" not in halves.seen[f"{i}"]
    assert {f"decode {i}" for i in range(5)} <= main.behind


def test_what_must_be_on_the_machine_first_has_begun_before_the_attention_beside_it(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    names = ["0", "1", "2"]

    def step(name: str) -> Step:
        def decode(half: int, stream: FakeStream | None) -> None:
            halves.held[half] = name
            halves.seen[name] = (main if stream is None else stream).launch(f"decode {name}")

        return Step(name, decode, lambda _: main.launch(f"complete {name}"))  # type: ignore[arg-type]

    for call in range(2):
        steps = [step(name) for name in names]
        for i, half in staged(steps, DEVICE, ahead=True, first=True, lookahead=lookahead, follow=step("0")):
            assert halves.held[half] == names[i]
            following = names[(i + 1) % 3]
            assert following in halves.seen
            assert f"attend {i}" not in halves.seen[following] or call
            assert {f"decode {i}", f"complete {i}"} <= main.launch(f"attend {i}")
    assert "attend 1" in halves.seen["0"]
    assert "attend 2" in main.behind


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_graph_waits_for_no_event_of_a_call_before_it(cuda: FakeCuda, count: int) -> None:
    def call(name: str) -> None:
        def decode(_: int, stream: FakeStream | None) -> None:
            (cuda.current if stream is None else stream).launch(f"decode {name}")

        for _ in staged([Step(i, decode) for i in range(count)], DEVICE, ahead=True, first=True, lookahead=Lookahead()):  # type: ignore[arg-type]
            cuda.current.launch(f"attend {name}")

    call("eagerly")
    side = module._beside(DEVICE, cuda.current, module.BEFORE)  # type: ignore[arg-type]
    side.ready.behind.add("recorded outside")  # type: ignore[attr-defined]
    waited: list[set[str]] = []
    cuda.current.wait_event = lambda event: waited.append(set(event.behind))  # type: ignore[method-assign]
    cuda.capturing = True
    call("in a graph")
    assert all("recorded outside" not in behind for behind in waited)


@pytest.mark.parametrize("attended", [0, 1, 2])
def test_what_was_decoded_is_waited_for_when_an_attention_fails(cuda: FakeCuda, attended: int) -> None:
    main, halves = cuda.current, Halves()
    with closing(staged([halves.step(f"{i}") for i in range(4)], DEVICE, ahead=True)) as steps:
        for i in range(attended + 1):
            assert next(steps) == (i, i % 2)
    assert f"{attended}" in halves.seen
    assert {f"decode {name}" for name in halves.seen} <= main.behind


def test_callers_on_different_streams_do_not_share_a_side_stream(cuda: FakeCuda) -> None:
    def used(caller: FakeStream) -> set[int]:
        cuda.current, halves = caller, Halves()
        list(staged([halves.step(f"{i}") for i in range(3)], DEVICE, ahead=True))
        return {stream.cuda_stream for stream in halves.streams}

    one, other = FakeStream(), FakeStream()
    assert used(one) == used(one)
    assert used(one).isdisjoint(used(other))


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_first_slice_of_the_next_layer_is_decoded_beside_the_last_one_of_this(cuda: FakeCuda, slices: int) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    for layer in range(4):
        names = [f"{layer}.{i}" for i in range(slices)]
        halves.attend(main, names, lookahead, f"{layer + 1}.0")
        assert f"{layer + 1}.0" in halves.seen
        assert f"attend {layer}.{slices - 1}" not in halves.seen[f"{layer + 1}.0"]
        main.launch(f"projections {layer}")
    assert halves.count == 4 * slices + 1
    assert all(f"projections {layer}" not in halves.seen[f"{layer + 1}.0"] for layer in range(4))


def test_a_wrong_guess_is_decoded_over_and_never_attended_to(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    halves.attend(main, ["a0", "a1"], lookahead, "b0")
    halves.attend(main, ["c0", "c1", "c2"], lookahead, None)
    assert "decode b0" in halves.seen["c0"]
    assert "decode b0" in main.behind
    halves.attend(main, ["b0"], lookahead, None)
    assert "attend c2" in halves.seen["b0"]


def test_settling_orders_the_current_stream_behind_what_was_decoded(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    halves.attend(main, ["a0"], lookahead, "b0")
    assert "decode b0" not in main.behind
    cuda.current = FakeStream()
    lookahead.settle()
    assert "decode b0" in cuda.current.behind
    halves.seen.clear()
    cuda.current = main
    halves.attend(main, ["b0"], lookahead, None)
    assert "b0" in halves.seen, "what was settled may have been written over"


def test_settling_on_another_stream_orders_the_attending_one_as_well(cuda: FakeCuda) -> None:
    """Whoever asks for figures in a thread of their own settles, too."""
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    halves.attend(main, ["a0"], lookahead, "b0")
    cuda.current = FakeStream()
    lookahead.settle()
    assert "decode b0" in main.behind


def test_a_call_on_another_stream_decodes_for_itself_behind_the_guess(cuda: FakeCuda) -> None:
    halves, lookahead = Halves(), Lookahead()
    halves.attend(cuda.current, ["a0"], lookahead, "b0")
    halves.seen.clear()
    cuda.current = FakeStream()
    halves.attend(cuda.current, ["b0"], lookahead, None)
    assert "decode b0" in halves.seen["b0"]


def test_a_failed_attention_leaves_no_guess(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    steps, follow = [halves.step("a0")], halves.step("b0")
    with closing(staged(steps, DEVICE, ahead=True, lookahead=lookahead, follow=follow)) as turns:
        next(turns)
    assert {f"decode {name}" for name in halves.seen} <= main.behind
    halves.seen.clear()
    halves.attend(main, ["b0"], lookahead, None)
    assert "b0" in halves.seen


def test_only_calls_that_go_from_layer_to_layer_are_guessed_and_none_once_a_graph_was_captured(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    assert not lookahead.goes_on(("chunk", 0), ("chunk", 29))
    assert lookahead.goes_on(("chunk", 1), ("chunk", 0))
    assert not lookahead.goes_on(("other", 1), ("other", 0))
    cuda.capturing = True
    halves.attend(main, ["a0"], lookahead, None)
    cuda.capturing = False
    assert not lookahead.goes_on(("other", 2), ("other", 1))


def test_settling_inside_a_graph_waits_for_nothing_that_was_launched_outside(cuda: FakeCuda) -> None:
    main, halves, lookahead = cuda.current, Halves(), Lookahead()
    halves.attend(main, ["a0"], lookahead, "b0")
    cuda.capturing = True
    lookahead.settle()
    cuda.capturing = False
    assert "decode b0" not in main.behind
    assert not lookahead.goes_on(("chunk", 1), None)
    halves.seen.clear()
    halves.attend(main, ["b0"], lookahead, None)
    assert "b0" in halves.seen


@pytest.mark.usefixtures("cuda")
def test_without_a_side_stream_everything_runs_in_one_half_on_the_callers() -> None:
    given = []
    steps = [Step(i, lambda half, stream: given.append((half, stream))) for i in range(3)]
    assert list(staged(steps, DEVICE, ahead=False, lookahead=Lookahead())) == [(0, 0), (1, 0), (2, 0)]
    assert given == [(0, None)] * 3
