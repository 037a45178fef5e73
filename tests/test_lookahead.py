"""Order of a side stream and its caller's, on streams that note what each of them knows to be done."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial

import pytest
import torch

from qvg_paged.kernels import lookahead
from qvg_paged.kernels.lookahead import staged

DEVICE = torch.device("cuda", 0)


class FakeStream:
    """What was launched on a stream, and all that happened before whatever is launched next."""

    count = 0

    def __init__(self, *_: object, **__: object) -> None:
        FakeStream.count += 1
        self.cuda_stream = FakeStream.count
        self.behind: set[str] = set()

    def launch(self, name: str) -> set[str]:
        before = set(self.behind)
        self.behind.add(name)
        return before

    def record_event(self) -> set[str]:
        return set(self.behind)

    def wait_event(self, event: set[str]) -> None:
        self.behind |= event

    def wait_stream(self, other: "FakeStream") -> None:
        self.behind |= other.behind


class FakeCuda:
    """The parts of `torch.cuda` that order work."""

    def __init__(self) -> None:
        self.current = FakeStream()

    def current_stream(self, _: torch.device) -> FakeStream:
        return self.current

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.current_stream)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    lookahead._side_stream.cache_clear()
    yield fake
    lookahead._side_stream.cache_clear()


def test_a_half_is_decoded_ahead_and_only_behind_the_attention_that_read_it(cuda: FakeCuda) -> None:
    main, seen = cuda.current, {}

    def decode(i: int) -> None:
        assert cuda.current is not main
        seen[i] = cuda.current.launch(f"decode {i}")

    for i in staged([partial(decode, i) for i in range(5)], DEVICE, ahead=True):
        assert f"decode {i}" in main.launch(f"attend {i}")
        assert i == 4 or i + 1 in seen
    for i in range(2, 5):
        assert f"attend {i - 2}" in seen[i]
        assert f"attend {i - 1}" not in seen[i]
    assert {f"decode {i}" for i in range(5)} <= main.behind


def test_what_runs_ahead_is_waited_for_when_an_attention_fails(cuda: FakeCuda) -> None:
    main = cuda.current

    def decode(i: int) -> None:
        cuda.current.launch(f"decode {i}")

    with closing(staged([partial(decode, i) for i in range(3)], DEVICE, ahead=True)) as steps:
        assert next(steps) == 0
    assert "decode 1" in main.behind


def test_callers_on_different_streams_do_not_share_a_side_stream(cuda: FakeCuda) -> None:
    def used(caller: FakeStream) -> set[int]:
        cuda.current, seen = caller, set[int]()
        list(staged([lambda: seen.add(cuda.current.cuda_stream)] * 3, DEVICE, ahead=True))
        return seen

    one, other = FakeStream(), FakeStream()
    assert used(one) == used(one)
    assert used(one).isdisjoint(used(other))
