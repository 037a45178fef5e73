"""Decoding one slice ahead: a side stream fills one half of the scratch while attention reads the other.

Within a call that hides all decoding but the first. A `Lookahead` that is kept between calls hides that, too: behind
the last slice of a layer the first one of the next layer is decoded, if the calls so far went from layer to layer.
"""

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Lookahead", "Step", "staged"]


AFTER, BEFORE = 0, -1
"""Priorities of a side stream: as a caller's stream, whose attention was launched before and takes the machine first;
or before that, where decoding takes few multiprocessors and attention would leave none to whoever comes later."""


@dataclass(frozen=True)
class Step:
    """Decoding of one slice.

    Attributes:
        key: what is decoded, from where and to where: equal keys leave the same bytes in the same half.
        decode: launches it into a half of the scratch, on a stream or, given None, on the current one; as far as it
            leaves alone what the step before decoded into the other half.
        complete: launches what is left into that half, on the current stream, once nobody reads the other any more.
    """

    key: Hashable
    decode: Callable[[int, torch.cuda.Stream | None], None]
    complete: Callable[[int], None] = lambda _: None


class _Side:
    """A stream beside a caller's one, and the events that order them; waiting for a later record is as good."""

    def __init__(self, device: torch.device, main: torch.cuda.Stream, priority: int) -> None:
        self.main = main
        self.stream = torch.cuda.Stream(device, priority=priority)
        self.begun = torch.cuda.Event()
        self.ready = torch.cuda.Event()
        self.attended = torch.cuda.Event()


@lru_cache
def _beside(device: torch.device, main: torch.cuda.Stream, priority: int) -> _Side:
    """The one beside a caller's stream; if it were shared, a graph would capture what other callers launch."""
    return _Side(device, main, priority)


class Lookahead:
    """What was decoded for a call that has not come yet, in a workspace that only calls with this object use.

    A wrong guess costs time only. Whoever uses the workspace otherwise, or changes or frees pages, settles before.
    Graphs may be captured, but replays use the workspace unseen: from the first capture on nothing is guessed.
    """

    def __init__(self) -> None:
        self._guess: tuple[Step, _Side, int] | None = None
        self._last: Hashable = None
        self._captured = False

    def settle(self) -> None:
        """Order the attending stream and the current one behind what was decoded, and forget it; from any thread."""
        if self._guess is not None:
            (_, side, _), self._guess = self._guess, None
            self._note_capture()
            if not self._captured:
                side.main.wait_event(side.ready)
                torch.cuda.current_stream(side.stream.device).wait_event(side.ready)

    def goes_on(self, called: Hashable, expected: Hashable) -> bool:
        """Note that `called` runs, and that it is the layer after the last one if that was `expected`."""
        last, self._last = self._last, called
        return last == expected and not self._captured

    def _note_capture(self) -> None:
        """A graph can wait for nothing that was launched before it."""
        self._captured = self._captured or torch.cuda.is_current_stream_capturing()

    def _claim(self, first: Step, side: _Side) -> int | None:
        """Half that holds what `first` would decode."""
        self._note_capture()
        if self._guess is not None and not self._captured:
            step, on, half = self._guess
            if step.key == first.key and on is side:
                self._guess = None
                return half
        self.settle()
        return None

    def _keep(self, guess: tuple[Step, _Side, int]) -> None:
        self._guess = guess


def staged(
    steps: Sequence[Step],
    device: torch.device,
    *,
    ahead: bool,
    first: bool = False,
    lookahead: Lookahead | None = None,
    follow: Step | None = None,
) -> Generator[tuple[int, int], None, None]:
    """Decode one step ahead of the caller, who attends to step i in half h when (i, h) is yielded.

    Step i + 1 runs beside what the caller launched for step i, and behind everything it launched for step i - 1, whose
    half of the scratch it takes. On the caller's stream all of it has happened before whatever is launched after the
    last step, or after the generator was closed early, so memory may be returned as if there were one stream; a graph
    can be captured. Not `ahead`, without CUDA or with a single step and no `lookahead`, everything runs on the caller's
    stream, in half 0.

    Args:
        steps: what to decode; with a lookahead, the first may have been decoded already.
        device: where it runs.
        ahead: use the side stream.
        first: step i + 1 is launched before what the caller launches for step i, and is on the machine before that.
        lookahead: kept between calls.
        follow: what the next call will decode first, if it is known; needs a lookahead, which settles it.
    """
    if not steps or not ahead or device.type != "cuda" or (len(steps) < 2 and lookahead is None):
        if lookahead is not None:
            lookahead.settle()
        for i, step in enumerate(steps):
            step.decode(0, None)
            step.complete(0)
            yield i, 0
        return
    main = torch.cuda.current_stream(device)
    side = _beside(device, main, BEFORE if first else AFTER)
    claimed = lookahead._claim(steps[0], side) if lookahead is not None else None
    begin = claimed or 0
    side.attended.record(main)
    every = [*steps, follow] if follow is not None else steps

    def launch(i: int) -> None:
        side.stream.wait_event(side.attended)
        if first:
            side.begun.record(side.stream)
        every[i].decode((begin + i) % 2, side.stream)
        side.ready.record(side.stream)

    try:
        if claimed is None and first:  # nothing runs beside it
            steps[0].decode(begin, None)
        elif claimed is None:
            launch(0)
        for i in range(len(steps)):
            if i or claimed is not None or not first:  # else the last record is another call's, unknown to a graph
                main.wait_event(side.ready)
            steps[i].complete((begin + i) % 2)
            if first and i + 1 < len(every):
                launch(i + 1)
                main.wait_event(side.begun)
            yield i, (begin + i) % 2
            if not first and i + 1 < len(every):
                launch(i + 1)
            if i + 1 < len(steps):
                side.attended.record(main)
    except BaseException:
        main.wait_stream(side.stream)
        raise
    if lookahead is not None and follow is not None:
        lookahead._keep((follow, side, (begin + len(steps)) % 2))
