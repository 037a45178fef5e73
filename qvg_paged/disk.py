"""Files of parked streams: written aside, flushed, renamed; what is not complete is never seen.

A process that is killed leaves complete files and files that are still being written; the latter have another name and
are removed when the next manager opens the folder. A folder belongs to one manager at a time.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from qvg_paged.container import decode_header, encode_header, owner_of
from qvg_paged.errors import ArgumentError, CorruptedError, OutOfMemoryError, StorageError
from qvg_paged.events import fault_point
from qvg_paged.image import Image
from qvg_paged.kernels.layout import PageLayout

__all__ = ["Container", "DiskTier"]

SUFFIX = ".qvg.safetensors"
UNFINISHED = ".unfinished"
PIECE_NBYTES = 16 << 20
"""Bytes of a stream that go through host memory at a time."""

Copy = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Container:
    """A complete file: `data_start` bytes of header, then `nbytes` bytes of data."""

    path: Path
    nbytes: int
    data_start: int


class DiskTier:
    """A folder with a byte budget.

    Args:
        path: the folder; made if it is missing.
        nbytes: most bytes of files in it.
        layouts: page layouts of the manager.
        pinned: whether a device copies from and to host memory.

    Attributes:
        used_nbytes: bytes of the files in it, those of earlier processes included, headers of new ones apart.
        leftover_nbytes: bytes of files that earlier processes have left.

    Raises:
        StorageError: the folder cannot be made or read.
    """

    def __init__(self, path: Path, nbytes: int, layouts: Sequence[PageLayout], *, pinned: bool) -> None:
        self.path = path
        self.nbytes = nbytes
        self._layouts = tuple(layouts)
        self._pinned = pinned
        self._bounce: torch.Tensor | None = None
        try:
            path.mkdir(parents=True, exist_ok=True)
            for file in path.glob(f"*{UNFINISHED}"):
                file.unlink()
            self.leftover_nbytes = self.used_nbytes = sum(file.stat().st_size for file in path.glob(f"*{SUFFIX}"))
        except OSError as error:
            raise StorageError(f"disk_path: expected a folder to write to, got {str(path)!r}: {error}") from error

    def write(self, stream_id: str, tenant: str, image: Image, read: Copy) -> Container:
        """Write an image; ``read(start, piece)`` fills a host tensor with its bytes from `start` on.

        Raises:
            OutOfMemoryError: the budget is used up; nothing was written.
            StorageError: the disk failed; no file of it is left.
        """
        owner = owner_of(tenant, stream_id)
        header = encode_header(image, owner, self._layouts)
        target = self.path / f"{owner}{SUFFIX}"
        old = _size(target)
        if self.used_nbytes - old + image.nbytes > self.nbytes:
            raise OutOfMemoryError(
                f"disk exhausted: {image.nbytes} bytes requested, {self.nbytes - self.used_nbytes} of {self.nbytes} "
                "are free; raise disk_memory",
                image.nbytes,
                self.nbytes - self.used_nbytes,
            )
        aside = self.path / f"{owner}{UNFINISHED}"
        written = aside
        try:
            self._write(aside, header, image.nbytes, read)
            fault_point("disk.rename")
            written = aside.replace(target)
            self.used_nbytes += image.nbytes - old
            _sync_folder(self.path)
            fault_point("disk.published")
        except BaseException as error:
            self.used_nbytes -= image.nbytes if written == target else 0
            with suppress(OSError):
                written.unlink()
            if isinstance(error, OSError):
                raise StorageError(f"park: expected the disk to take {image.nbytes} bytes, got {error}") from error
            raise
        return Container(target, image.nbytes, len(header))

    def _write(self, path: Path, header: bytes, nbytes: int, read: Copy) -> None:
        fault_point("disk.open")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            for start in range(0, nbytes, PIECE_NBYTES):
                piece = self._piece(min(PIECE_NBYTES, nbytes - start))
                read(start, piece)
                _write_all(file.fileno(), piece.numpy().data)
            fault_point("disk.sync")
            os.fsync(file.fileno())

    def read(self, container: Container, write: Copy) -> None:
        """Hand an image's bytes on, piece by piece: ``write(start, piece)``.

        Raises:
            CorruptedError: the file is shorter than it was.
            StorageError: the disk failed.
        """
        nbytes = container.nbytes
        try:
            with container.path.open("rb", buffering=0) as file:
                file.seek(container.data_start)
                for start in range(0, nbytes, PIECE_NBYTES):
                    fault_point("disk.read")
                    piece = self._piece(min(PIECE_NBYTES, nbytes - start))
                    view = piece.numpy().data
                    while view:
                        count = file.readinto(view)
                        if not count:
                            raise CorruptedError(f"file: expected {nbytes} bytes of data, it ends before")
                        view = view[count:]
                    write(start, piece)
        except OSError as error:
            raise StorageError(f"resume: expected to read {str(container.path)!r}, got {error}") from error

    def find(self, stream_id: str, tenant: str) -> tuple[Image, Container]:
        """The image that an earlier process left, and its file.

        Raises:
            ArgumentError: there is none.
            CorruptedError: it is damaged.
            StorageError: the disk failed, or it was written by another version or for another model.
        """
        owner = owner_of(tenant, stream_id)
        path = self.path / f"{owner}{SUFFIX}"
        try:
            with path.open("rb") as file:
                nbytes = os.fstat(file.fileno()).st_size
                prefix = file.read(8)
                data = prefix + file.read(min(int.from_bytes(prefix, "little"), nbytes))
        except FileNotFoundError as error:
            raise ArgumentError(
                f"stream_id: expected a stream that was parked on this disk by tenant {tenant!r}, got {stream_id!r}"
            ) from error
        except OSError as error:
            raise StorageError(f"restore: expected to read {str(path)!r}, got {error}") from error
        image, start = decode_header(data, nbytes, owner, self._layouts)
        self.used_nbytes -= start  # from now on its header does not count
        self.leftover_nbytes -= start
        return image, Container(path, image.nbytes, start)

    def remove(self, container: Container) -> None:
        """Delete a file; one that is gone already is as good as deleted."""
        with suppress(OSError):
            container.path.unlink()
        self.used_nbytes -= container.nbytes

    def _piece(self, nbytes: int) -> torch.Tensor:
        if self._bounce is None:
            self._bounce = torch.empty(PIECE_NBYTES, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bounce[:nbytes]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write_all(file: int, view: memoryview) -> None:
    while view:
        fault_point("disk.write")
        view = view[os.write(file, view[:PIECE_NBYTES]) :]


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
