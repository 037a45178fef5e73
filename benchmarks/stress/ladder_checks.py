"""The ladder, from the log alone: streams only go down, no further than their floors, and only while they run."""

from typing import Any

from stress.ledger import Ledger

__all__ = ["check_ladder", "note_floors"]


def note_floors(ledger: Ledger, record: dict[str, Any]) -> None:
    """What a submitted stream puts up with."""
    stream, quality = ledger.streams[record["id"]], record["quality"]
    stream.lowest, stream.least_kept = quality["rung"], quality["retrieval_frames"]
    stream.kept = record["window"]["retrieval_frames"]


def check_ladder(ledger: Ledger, plan: dict[str, Any]) -> None:
    """The plan's demotions, before anything else of it is taken in."""
    for name, rung, since in plan["demoted"]:
        stream = ledger.streams[name]
        lowest = min(stream.lowest, ledger.tenants[stream.tenant].lowest)
        ledger.expect("ladder", stream.state == "running", f"{name!r} was demoted, it was {stream.state}")
        ledger.expect("ladder", stream.rung < rung, f"{name!r} went from rung {stream.rung} to {rung}")
        ledger.expect("ladder", rung <= lowest, f"{name!r} is on rung {rung}, its floor is {lowest}")
        ledger.expect("ladder", since <= stream.committed, f"{name!r} is demoted from frame {since} on")
        stream.rung = rung
    for name, kept in plan["shrunk"]:
        stream = ledger.streams[name]
        least = max(stream.least_kept, ledger.tenants[stream.tenant].least_kept)
        ledger.expect("ladder", stream.state == "running", f"{name!r} was shrunk, it was {stream.state}")
        ledger.expect("ladder", kept < stream.kept, f"{name!r} keeps {kept} frames instead of {stream.kept}")
        floored = kept >= min(least, stream.kept)
        ledger.expect("ladder", floored, f"{name!r} keeps {kept} frames, its floor is {least}")
        stream.kept = kept
