"""Policies by name: those of this package, those that other distributions declare, and ``module:Class``.

A distribution offers a policy as an entry point of the group ``qvg_paged.policies``. Nothing is imported before it is
asked for by name.
"""

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qvg_paged.errors import ArgumentError, ConfigError
from qvg_paged.scheduler.policy import FCFS, EarliestDeadline, FairShare, Policy, Priority

__all__ = ["GROUP", "available_policies", "load_policy"]

GROUP = "qvg_paged.policies"
OWN = {"fcfs": FCFS, "priority": Priority, "fair-share": FairShare, "earliest-deadline": EarliestDeadline}
HOOKS = ("rank", "park")


def available_policies() -> dict[str, str]:
    """Where each policy that has a name comes from, as ``module:Class``; names of this package cannot be taken."""
    found = {point.name: point.value for point in _points()}
    return found | {name: f"{kind.__module__}:{kind.__name__}" for name, kind in OWN.items()}


def load_policy(name: str, **settings: Any) -> Policy:
    """A policy by its name or as ``module:Class``.

    Args:
        name: one of `available_policies`, or an importable class or function that makes a policy.
        settings: arguments of its constructor.

    Raises:
        ArgumentError: no policy has that name, or it knows no such setting.
        ConfigError: it cannot be imported or made, or what it makes has no ``rank`` and ``park``.
    """
    factory = _factory(name)
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        raise ArgumentError(f"settings: expected settings of {name!r} ({known}), got {settings}: {error}") from None
    except ValueError:  # a callable of C code that does not tell its arguments
        pass
    try:
        policy = factory(**settings)
    except Exception as error:
        raise ConfigError(f"policy: {name!r} could not be made with {settings}: {_describe(error)}") from error
    missing = [hook for hook in HOOKS if not callable(getattr(policy, hook, None))]
    if missing:
        kind = type(policy).__name__
        raise ConfigError(f"policy: expected {name!r} to make an object with rank and park, {kind} lacks {missing}")
    return policy  # type: ignore[no-any-return]


def _factory(name: str) -> Any:
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"policy: expected a name or module:Class, got {name!r}")
    if name in OWN:
        return OWN[name]
    point = next((point for point in _points() if point.name == name), None)
    if point is None and ":" not in name:
        known = ", ".join(sorted(available_policies()))
        raise ArgumentError(f"policy: expected one of {known}, or module:Class, got {name!r}")
    module, _, path = (point.value if point else name).partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.strip().split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a foreign module does when it is imported
        raise ConfigError(f"policy: {name!r} could not be imported: {_describe(error)}") from error
    if not callable(found):
        raise ConfigError(f"policy: expected {name!r} to be a class or function, got {type(found).__name__}")
    return found


def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
