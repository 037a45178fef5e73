"""The seam for policies: they see snapshots and return ids, and the core checks every answer."""

from collections.abc import Sequence
from typing import Protocol

from qvg_paged.scheduler.request import WaitingStream

__all__ = ["FCFS", "Policy", "ranked"]


class Policy(Protocol):
    """Who is next. A policy can make the system slow, never wrong."""

    def rank(self, waiting: Sequence[WaitingStream]) -> Sequence[str]:
        """Ids of all `waiting` streams, best first.

        `waiting` comes in order of arrival. An answer that is not a permutation of its ids, or an exception, is
        replaced by that order and reported in ``Plan.policy_fault``.
        """
        ...


class FCFS:
    """First come, first served. A large stream at the head of the line holds up smaller ones behind it."""

    def rank(self, waiting: Sequence[WaitingStream]) -> Sequence[str]:
        """Order of arrival."""
        return [stream.request.id for stream in waiting]


def ranked(policy: Policy, waiting: Sequence[WaitingStream]) -> tuple[list[str], str]:
    """The policy's order and an empty string, or order of arrival and what was wrong with the answer."""
    arrival = [stream.request.id for stream in waiting]
    name = type(policy).__name__
    try:
        answer = list(policy.rank(tuple(waiting)))
        if len(answer) == len(arrival) and set(answer) == set(arrival):
            return answer, ""
    except Exception as error:
        return arrival, f"{name}.rank raised {type(error).__name__}: {error}"
    return arrival, f"{name}.rank: expected each of the {len(arrival)} waiting ids once, got {len(answer)} answers"
