"""Options of a run, and what its rows share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bench.history import History, HistorySpec
from bench.released import ReleasedCodec
from qvg_paged import ArgumentError

__all__ = ["PARTS", "Bench", "BenchOptions"]

PARTS = ("attention", "encode", "decode", "manager")
RELEASED_ITERATIONS = 2


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured and for how long.

    Attributes:
        parts: of `PARTS`.
        device: cpu or cuda.
        official: clone of the released Quant VideoGen code, or None.
        only: rows whose name contains one of these; all if empty.
        quick: few rows, short timings.
        seconds: no row is started after this long; None for no limit.
        seed: of the random inputs.
    """

    parts: Sequence[str] = PARTS
    device: str = "cpu"
    official: Path | None = None
    only: Sequence[str] = ()
    quick: bool = False
    seconds: float | None = None
    seed: int = 0


@dataclass
class Bench:
    """A run: its options, its device, and the latest history, which neighbouring rows share."""

    options: BenchOptions
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        if self.device == torch.device("cuda") and torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._history: History | None = None

    @property
    def is_small(self) -> bool:
        """Shapes for a machine without a GPU."""
        return self.device.type != "cuda"

    @cached_property
    def released(self) -> ReleasedCodec | None:
        """The released codec, if a path to it was given.

        Raises:
            ArgumentError: there is no clone of it at that path, or no GPU to run it.
        """
        if self.options.official is None:
            return None
        if self.is_small:
            raise ArgumentError("official: expected a CUDA device for the released kernels, got a CPU; leave it out")
        return ReleasedCodec(self.options.official, RELEASED_ITERATIONS)

    def history(self, spec: HistorySpec) -> History:
        """The history of that shape; the last one is kept for the next row."""
        if self._history is None or self._history.spec != spec:
            self.drop_history()
            self._history = History.filled(spec, self.device)
        return self._history

    def drop_history(self) -> None:
        """Give its memory back."""
        self._history = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
