"""Root of the error hierarchy; the store adds its own classes in `qvg_paged.errors`.

Messages follow one pattern: argument, what was expected, what came, and where there is one the remedy.
"""

__all__ = ["ArgumentError", "QvgPagedError"]


class QvgPagedError(Exception):
    """Base class of every error this library raises on purpose."""


class ArgumentError(QvgPagedError, ValueError):
    """An argument has the wrong shape, dtype, device, range or name; nothing was changed."""
