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
