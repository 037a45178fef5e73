"""The examples in the documentation run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


@pytest.mark.usefixtures("one_thread")
def test_the_engine_example_generates_both_streams_and_returns_all_memory(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runpy.run_path(str(EXAMPLES / "engine.py"))
    printed = capsys.readouterr().out
    for name in ("shot-1", "shot-2"):
        assert f"{name} all 24 frames are committed" in printed
    assert "quantised_frames=13" in printed
    assert scope["cache"].stats().used_nbytes == 0


@pytest.mark.usefixtures("one_thread")
def test_the_asyncio_example_serves_two_viewers_and_lets_the_third_hang_up(capsys: pytest.CaptureFixture[str]) -> None:
    scope = runpy.run_path(str(EXAMPLES / "async_engine.py"))
    printed = capsys.readouterr().out
    for name in ("shot-1", "shot-2"):
        assert f"{name} 8 chunks of [192, 2, 64] all 24 frames are committed" in printed
    assert "shot-3 2 chunks of [192, 2, 64] cancelled at frame" in printed
    assert scope["cache"].stats().used_nbytes == 0
