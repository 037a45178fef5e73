"""Decoding one slice ahead: a side stream fills one half of the scratch while attention reads the other."""

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache

import torch

__all__ = ["staged"]


@lru_cache
def _side_stream(device: torch.device, _main: int) -> torch.cuda.Stream:
    """The one beside a caller's stream; if it were shared, a graph would capture what other callers launch."""
    return torch.cuda.Stream(device, priority=-1)


def staged(decode: Sequence[Callable[[], None]], device: torch.device, *, ahead: bool) -> Generator[int, None, None]:
    """Run `decode` one step ahead of the caller, who attends to step i when i is yielded.

    Step i + 1 runs beside what the caller launches for step i, and behind everything it launched for step i - 1, whose
    half of the scratch it takes. On the caller's stream all of it has happened before whatever is launched after the
    last step, or after the generator was closed early, so memory may be returned as if there were one stream; a graph
    can be captured. Not `ahead`, without CUDA or with a single step, everything runs on the caller's stream.
    """
    if not ahead or device.type != "cuda" or len(decode) < 2:
        for i, step in enumerate(decode):
            step()
            yield i
        return
    main = torch.cuda.current_stream(device)
    side = _side_stream(device, main.cuda_stream)
    attended = [main.record_event()]

    def launch(i: int) -> torch.cuda.Event:
        side.wait_event(attended[max(0, i - 1)])
        with torch.cuda.stream(side):
            decode[i]()
            event: torch.cuda.Event = side.record_event()
        return event

    try:
        ready = launch(0)
        for i in range(len(decode)):
            main.wait_event(ready)
            if i + 1 < len(decode):
                ready = launch(i + 1)
            yield i
            attended.append(main.record_event())
    except BaseException:
        main.wait_stream(side)
        raise
