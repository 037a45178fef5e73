"""The line: who is next, looked at only as far as somebody asks."""

from dataclasses import dataclass

import pytest

from qvg_paged.scheduler.decision import Decision, Reason
from qvg_paged.scheduler.line import ByKey, Ranking, Spot, Waiting


@dataclass(frozen=True)
class Placed:
    id: str
    tenant: str = "a"


def spots(*names: str, key: float = 0.0, first: int = 1) -> list[Spot]:
    return [(key, first + place, name) for place, name in enumerate(names)]


def walked(order: ByKey | Ranking, barred: set[str] | None = None) -> list[str]:
    return [name for _, name in order.walk(barred if barred is not None else set())]


LINES = {"a": [(1.0, 2, "a2"), (3.0, 1, "a1")], "b": [(2.0, 4, "b4"), (3.0, 3, "b3")]}


def test_by_key_goes_by_key_and_then_by_arrival_whosever_streams_they_are() -> None:
    assert walked(ByKey(LINES, None)) == ["a2", "b4", "a1", "b3"]


def test_turns_of_tenants_come_before_their_streams_keys() -> None:
    turns = {"a": (5.0, 1.0), "b": (0.0, 5.5)}
    order = ByKey(LINES, turns)
    assert walked(order) == ["b4", "a2", "b3", "a1"], "turns at 0, 5, 5.5, 6"
    assert order.turn("a", 1) == (6.0, 2)
    assert order.turn_of("b", 3.0, 3) == (5.5, 4)


def test_a_tie_of_turns_goes_to_the_tenant_whose_first_stream_has_waited_longest() -> None:
    lines = {"late": spots("l", first=9), "early": spots("e", first=2)}
    assert walked(ByKey(lines, {"late": (1.0, 1.0), "early": (1.0, 1.0)})) == ["e", "l"]


def test_who_is_ahead_goes_first_and_comes_once() -> None:
    order = ByKey(LINES, None, out={"b4"})
    order.ahead = [("b", "b3")]
    assert walked(order) == ["b3", "a2", "a1"]


@pytest.mark.parametrize("order", [ByKey(LINES, None), Ranking([Placed("a2"), Placed("b4", "b"), Placed("a1")])])
def test_a_tenant_that_is_barred_on_the_way_is_left_out_from_there_on(order: ByKey | Ranking) -> None:
    barred: set[str] = set()
    found = []
    for tenant, name in order.walk(barred):
        found.append(name)
        barred.add("a" if tenant == "a" else "")
    assert "a1" not in found
    assert found[:2] == ["a2", "b4"]


def test_those_ahead_can_be_barred_too() -> None:
    order = ByKey(LINES, None)
    order.ahead = [("b", "b3"), ("a", "a1")]
    assert walked(order, {"b"}) == ["a1", "a2"]


def test_everybody_is_told_what_concerns_them_most() -> None:
    own = Decision("a2", Reason.NO_MEMORY, "needs more")
    parked = Decision("p", Reason.SQUEEZED, "had to go")
    told = Waiting(
        ByKey(LINES, None),
        {"a2": own},
        (Reason.BEHIND, "others first"),
        {"b": (Reason.QUOTA, "no more for b")},
        {"a1"},
        [parked],
    )
    assert told.decisions == (
        own,
        Decision("b4", Reason.QUOTA, "no more for b"),
        Decision("b3", Reason.QUOTA, "no more for b"),
        parked,
    )
    again = Waiting(Ranking([Placed("a2"), Placed("b4", "b"), Placed("b3", "b")]), {"a2": own}, (Reason.BEHIND, ""),
                    {"b": (Reason.QUOTA, "no more for b")}, parked=[parked])  # fmt: skip
    assert told == again
    assert hash(told) == hash(again)
    assert told != Waiting()
    assert told != "a2"


def test_a_line_that_nobody_looked_at_is_empty_but_for_those_who_were_parked() -> None:
    parked = Decision("p", Reason.SQUEEZED, "had to go")
    assert Waiting(parked=[parked]).decisions == (parked,)
    assert Waiting().decisions == ()
