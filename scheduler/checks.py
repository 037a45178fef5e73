"""Checks of arguments at the scheduler's boundary: every message says argument, expectation and value."""

from typing import Any

from qvg_paged.checks import check_name, shown
from qvg_paged.errors import ArgumentError

__all__ = ["MAX_COUNT", "check_fps", "check_integer", "check_kind", "check_name", "check_number", "one_line", "shown"]

MAX_COUNT = 1 << 31
MAX_TEXT = 500


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


def check_fps(value: float | None) -> None:
    """Raise `ArgumentError` unless `value` is a play-out rate or None."""
    if value is not None:
        check_number("deadline_fps", value, 1e-6, 1e6, "a positive number from 1e-6 to 1e6, or None")


def one_line(text: str) -> str:
    """A text from outside as part of a sentence: at most 500 characters, nothing that could break a line of a log."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:MAX_TEXT])[:MAX_TEXT]
