"""Errors of the store. All derive from `QvgPagedError`; a message names the argument, the expectation and the value."""

from qvg_paged.kernels.errors import ArgumentError, QvgPagedError

__all__ = [
    "ArgumentError",
    "ConfigError",
    "CorruptedError",
    "IntegrityError",
    "NonFiniteError",
    "OutOfMemoryError",
    "QualityFloorError",
    "QvgPagedError",
    "StaleHandleError",
    "StateError",
    "StorageError",
]


class ConfigError(ArgumentError):
    """A model, cache or window description cannot work; the message says what would."""


class StateError(QvgPagedError):
    """The call does not fit the object's state: closed stream, finished chunk, layer missing at commit."""


class StaleHandleError(QvgPagedError):
    """A page or codebook handle was used after its memory had been returned."""


class NonFiniteError(QvgPagedError):
    """K or V held NaN or infinity at commit; the chunk was aborted, everything else is as it was."""


class IntegrityError(QvgPagedError):
    """`check_integrity` found the books wrong: a bug in the library, never the caller's fault."""


class OutOfMemoryError(QvgPagedError):
    """The pool cannot hold what was asked for; ordinary, and nothing was changed.

    Attributes:
        requested: bytes that were asked for.
        available: bytes that are free, in slabs of any size class.
    """

    def __init__(self, message: str, requested: int, available: int) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available


class QualityFloorError(QvgPagedError):
    """A stream may not be squeezed that far, by its own floor or its tenant's; nothing changed."""


class StorageError(QvgPagedError):
    """The disk failed or is full; the stream is where it was."""


class CorruptedError(QvgPagedError):
    """A parked copy is not, byte for byte, what was parked; no other copy is left. The stream can only be closed."""
