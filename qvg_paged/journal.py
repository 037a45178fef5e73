"""Events as JSON lines: one object per line, versioned, numbered, ASCII, so that no name can break one.

    with JsonLines("events.jsonl") as lines, JsonLines("decisions.jsonl") as decisions:
        cache = KVCacheManager(model, CacheConfig(memory="8GiB", on_event=lines.event))
        scheduler = Scheduler(cache, log=DecisionLog(decisions))

A record of a page event has ``v``, ``seq``, ``t`` (seconds, monotonic), ``kind`` "page", ``event`` and the fields of
`CacheEvent`. Lines of the scheduler's decision log are written as they come.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from qvg_paged.errors import ArgumentError
from qvg_paged.events import CacheEvent

__all__ = ["JsonLines"]

VERSION = 1


class JsonLines:
    """A file that gets a line at a time, from any thread. A full disk costs lines, never a stream: see `lost`.

    Args:
        path: file to append to.
        rotate_nbytes: size at which it is renamed to ``path.1`` (and that to ``path.2``, ...); None: never.
        keep: how many of these are kept.
        clock: seconds for ``t``.

    Attributes:
        written: lines written.
        lost: lines that could not be written.

    Raises:
        ArgumentError: a size or number is out of range, or the file cannot be opened.
    """

    def __init__(
        self,
        path: "str | os.PathLike[str]",
        *,
        rotate_nbytes: int | None = None,
        keep: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value, least in (("rotate_nbytes", rotate_nbytes, 1 << 10), ("keep", keep, 1)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ArgumentError(f"{name}: expected an integer >= {least}, got {value!r}")
        self._path, self._most, self._keep, self._clock = Path(path), rotate_nbytes, keep, clock
        self._lock = threading.RLock()
        self._events = 0
        self.written = 0
        self.lost = 0
        try:
            self._file: IO[bytes] | None = self._open()
        except (OSError, ValueError) as error:
            raise ArgumentError(f"path: expected a file that can be written, got {str(path)!r}: {error}") from None

    def _open(self) -> IO[bytes]:
        return self._path.open("ab", buffering=0)

    def __call__(self, line: str) -> None:
        """Write a line, given without its end; whatever is not printable ASCII in it is escaped."""
        if not (line.isascii() and line.isprintable()):
            line = json.dumps(line)
        with self._lock:
            try:
                if self._file is None:
                    raise ValueError("closed")
                self._file.write(line.encode() + b"\n")
                self.written += 1
                if self._most is not None and self._file.tell() >= self._most:
                    self._rotate()
            except (OSError, ValueError):
                self.lost += 1

    def event(self, event: CacheEvent) -> None:
        """Write a page event; give this to ``CacheConfig(on_event=...)``."""
        record = {**vars(event), "event": event.kind.value, "kind": "page", "v": VERSION, "t": self._clock()}
        with self._lock:
            record["seq"] = self._events
            self._events += 1
            self(json.dumps(record, sort_keys=True, separators=(",", ":")))

    def _rotate(self) -> None:
        """Make room under the file's own name; whatever fails, lines go on to the file that is open."""
        for index in range(self._keep - 1, 0, -1):
            older = Path(f"{self._path}.{index}")
            if older.exists():
                older.replace(f"{self._path}.{index + 1}")
        self._path.replace(f"{self._path}.1")
        old, self._file = self._file, self._open()
        if old is not None:
            old.close()

    def close(self) -> None:
        """Close the file; lines that come later are lost."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
