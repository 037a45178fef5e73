"""Checks of arguments at the scheduler's boundary: every message says argument, expectation and value."""

from typing import Any

from qvg_paged.checks import check_name, shown
from qvg_paged.errors import ArgumentError

__all__ = ["MAX_COUNT", "check_integer", "check_kind", "check_name", "check_number", "shown"]

MAX_COUNT = 1 << 31


def check_integer(name: str, value: object, least: int, most: int = MAX_COUNT) -> None:
    """Raise `ArgumentError` unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name}: expected an integer >= {least}, got {shown(value)}")
    if value > most:
        raise ArgumentError(f"{name}: expected at most {most}, got {shown(value)}")


def check_number(name: str, value: object, least: float, most: float, expected: str) -> None:
    """Raise `ArgumentError` unless `value` is a number from `least` to `most`, in words what is `expected`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise `ArgumentError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ArgumentError(f"{name}: expected a {kind.__name__}, got {shown(value)}")
