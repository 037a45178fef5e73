"""Events as JSON lines: whatever a stream is called, a line is a line."""

import json
import threading
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WINDOW, grow, make_cache

from qvg_paged import ArgumentError, CacheEvent, EventKind
from qvg_paged.journal import JsonLines
from qvg_paged.scheduler import DecisionLog, Outcome, Scheduler, StreamRequest

HOSTILE = ["a\nb", "\r\n", "\x00", "\u2028", "\udc80", '"}{"', "%s %n", "../../etc", "\x1b[2J", "é", "{}", "\x85"]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_no_stream_id_can_break_a_line_of_either_log(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "events") as lines, JsonLines(tmp_path / "decisions") as decisions:
        cache = make_cache(on_event=lines.event)
        log = DecisionLog(decisions)
        scheduler = Scheduler(cache, log=log)
        for name in HOSTILE:
            scheduler.submit(StreamRequest(name, name, 3, WINDOW))
            grow(cache.open(name, tenant=name, window=WINDOW), 3)
        plan = scheduler.step(0.0)
        scheduler.update(plan, Outcome(failed={d.stream_id: d.stream_id for d in plan.running}))
        scheduler.step(1.0)
    events = records(tmp_path / "events")
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {event["stream"] for event in events} - {""} == set(HOSTILE)
    told = records(tmp_path / "decisions")
    assert [record["seq"] for record in told] == list(range(log.lines))
    assert [record["id"] for record in told if record["kind"] == "submit"] == HOSTILE
    assert sha256((tmp_path / "decisions").read_bytes()).hexdigest() == log.digest, "the file is the log"
    for name in ("events", "decisions"):
        assert all(byte == 10 or 32 <= byte < 127 for byte in (tmp_path / name).read_bytes())


@settings(max_examples=50)
@given(st.text(), st.text(), st.lists(st.integers(0, 9), max_size=3))
def test_an_event_comes_back_as_it_was(stream: str, tenant: str, frames: list[int]) -> None:
    with TemporaryDirectory() as folder:
        with JsonLines(Path(folder) / "x", clock=lambda: 1.5) as lines:
            lines.event(CacheEvent(EventKind.COMMIT, tenant, stream, tuple(frames), (7,), 256))
        (record,) = records(Path(folder) / "x")
    assert record == {
        "kind": "page", "event": "commit", "tenant": tenant, "stream": stream, "frames": frames, "pages": [7],
        "nbytes": 256, "detail": "", "v": 1, "seq": 0, "t": 1.5,
    }  # fmt: skip


def test_what_is_not_one_printable_line_is_escaped_as_a_whole(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "x") as lines:
        lines("two\nlines")
    assert records(tmp_path / "x") == ["two\nlines"]


def test_files_are_rotated_and_only_so_many_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with JsonLines(path, rotate_nbytes=1024, keep=2) as lines:
        for index in range(200):
            lines(json.dumps({"n": index, "pad": "." * 80}))
    assert {found.name for found in tmp_path.iterdir()} == {"x", "x.1", "x.2"}
    numbers = [record["n"] for name in ("x.2", "x.1", "x") for record in records(tmp_path / name)]
    assert numbers == list(range(numbers[0], 200))
    assert (lines.written, lines.lost) == (200, 0)


def test_a_disk_that_fails_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    lines = JsonLines(full)
    cache = make_cache(on_event=lines.event)
    grow(cache.open("a", window=WINDOW), 6)
    assert lines.written == 0
    assert lines.lost > 0
    lines.close()
    kept = JsonLines(tmp_path / "x")
    kept.close()
    kept.close()
    kept("{}")
    assert (kept.written, kept.lost) == (0, 1)


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    event = CacheEvent(EventKind.FREE, "t", "", (), tuple(range(100)), 1)
    with JsonLines(tmp_path / "x", rotate_nbytes=4096, keep=100) as lines:
        threads = [threading.Thread(target=lambda: [lines.event(event) for _ in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = [record["seq"] for path in tmp_path.iterdir() for record in records(path)]
    assert sorted(found) == list(range(400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotate_nbytes": 10}, "rotate_nbytes: expected an integer >= 1024, got 10"),
        ({"rotate_nbytes": True}, "rotate_nbytes"),
        ({"keep": 0}, "keep: expected an integer >= 1, got 0"),
        ({"path": "/"}, "path: expected a file that can be written, got '/'"),
        ({"path": "/nowhere/at all"}, "path: expected a file that can be written"),
        ({"path": "a\0b"}, "path: expected a file that can be written"),
    ],
)
def test_a_journal_that_cannot_be_is_an_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        JsonLines(**{"path": tmp_path / "x", **options})
