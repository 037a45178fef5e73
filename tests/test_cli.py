"""The command line: it says what it needs, what went wrong and what this machine offers."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qvg_paged import FORMATS, AttentionPath, cli, console

runner = CliRunner()


def out(result: Any) -> str:
    """Everything a call printed, without the line breaks that depend on the terminal's width."""
    return " ".join(result.output.split())


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(name in result.output for name in ("demo", "eval", "bench", "info"))


def test_help_of_the_demo_states_what_it_promises() -> None:
    module = cli._benchmark("demo_results")
    result = runner.invoke(cli.app, ["demo", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"at least {module.MIN_QUANTISED_SHARE:.0%}".replace("%", " %") in out(result)
    assert f"at least {module.MIN_PSNR:g} dB" in out(result)


def test_info_names_paths_and_formats_and_writes_them_as_json(tmp_path: Path) -> None:
    file = tmp_path / "new" / "info.json"
    result = runner.invoke(cli.app, ["info", "--json", str(file)])
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    assert set(found["formats"]) == set(FORMATS)
    assert set(found["paths"]) == {path.value for path in AttentionPath}
    assert all(name in result.output for name in FORMATS)
    assert found["formats"]["dense"] == {"bits_per_element": 16.0, "ratio": 1.0, "codebook_share": 0.0}


def test_info_counts_what_the_paper_counts_at_the_geometry_of_self_forcing(tmp_path: Path) -> None:
    file = tmp_path / "info.json"
    arguments = ["info", "--heads", "12", "--head-dim", "128", "--tokens-per-frame", "1560", "--span-frames", "24"]
    assert runner.invoke(cli.app, [*arguments, "--json", str(file)]).exit_code == 0
    assert json.loads(file.read_text())["formats"]["qvg-int2"]["ratio"] == pytest.approx(6.966, abs=5e-4)


def test_bad_geometry_is_one_line_and_status_2() -> None:
    result = runner.invoke(cli.app, ["info", "--head-dim", "96"])
    assert result.exit_code == 2
    assert "error: head_dim: expected one of (64, 128, 256), got 96" in out(result)


def test_bad_options_of_the_demo_are_one_line_and_status_2(tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["demo", "--format", "int3", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "format: expected one of dense, qvg-int2" in out(result)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_without_a_checkout_a_command_says_what_it_needs(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "qvg_paged" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(cli.app, [command])
    assert result.exit_code == 2
    assert "expected a checkout of the project" in out(result)


def test_a_checkout_in_the_current_directory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "world_streams.py").touch()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "qvg_paged" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.benchmarks_folder() == tmp_path / "benchmarks"


def test_a_package_that_only_benchmarks_need_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError("No module named 'PIL'", name="PIL")

    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=missing))
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 2
    assert "PIL: expected to be installed" in out(result)
    assert "qvg-paged[bench]" in out(result)


@pytest.mark.parametrize("held", [True, False])
def test_the_exit_status_of_the_demo_says_whether_its_promises_held(
    held: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = []
    module = SimpleNamespace(DemoOptions=SimpleNamespace, run=lambda _options, _progress: demo_result(held))
    files = SimpleNamespace(write=lambda path, content: written.append((path, content)))
    monkeypatch.setattr(cli, "_benchmark", {"demo": module, "results_file": files}.__getitem__)
    result = runner.invoke(cli.app, ["demo", "--json", str(tmp_path / "demo.json")])
    assert result.exit_code == (0 if held else 1)
    assert written == [(tmp_path / "demo.json", demo_result(held))]
    assert ("NOT HELD" in result.output) is not held
    assert "refused: too large" in out(result)


def demo_result(held: bool) -> dict[str, Any]:
    """A result of one finished and one refused stream."""
    finished = {
        "stream": "shot-1", "tenant": "a", "finished": True, "decision": "", "waits": 0, "dense_nbytes": 2_000_000,
        "nbytes": 500_000, "ratio": 4.0, "quantised_share": 0.8, "frames_per_second": 1.5, "psnr": 25.0,
        "psnr_truth": 17.0, "psnr_truth_dense": 17.5,
    }  # fmt: skip
    refused = {"stream": "shot-2", "tenant": "b", "finished": False, "decision": "refused: too large", "waits": 3,
               "dense_nbytes": 2_000_000}  # fmt: skip
    budget = dict.fromkeys(("pool", "staging", "encode", "overhead"), 250_000)
    summary = {"memory_nbytes": 1_000_000, "peak_nbytes": 900_000, "budget": budget, "dense_stream_nbytes": 2_000_000,
               "dense_nbytes": 4_000_000, "nbytes": 500_000, "quantised_share": 0.8, "psnr": 25.0,
               "frames_per_second": 1.5, "seconds": 3.0}  # fmt: skip
    check = {"name": "every stream finished", "held": held, "text": "shot-2: refused: too large"}
    return {"results": {"rows": [finished, refused], "summary": summary, "checks": [check]}}


def printed(terminal: bool) -> list[str]:
    """What the progress of one stream over 48 frames prints."""
    stream = io.StringIO()
    with console.StreamProgress(Console(file=stream, force_terminal=terminal, width=120)) as progress:
        progress.phase("a part", ["shot-1"], 48)
        progress.stream("shot-1", 0, "no memory")
        progress.stream("shot-1", 0, "no memory")
        for frame in range(1, 49):
            progress.stream("shot-1", frame, "generated")
    return stream.getvalue().splitlines()


def test_progress_is_a_few_plain_lines_without_a_terminal() -> None:
    lines = printed(terminal=False)
    assert lines[0] == "a part"
    assert lines[1] == "  shot-1: 0 of 48 frames, no memory"
    assert lines[2:] == [f"  shot-1: {frame} of 48 frames, generated" for frame in (12, 24, 36, 48)]


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = "".join(printed(terminal=True))
    assert "48/48" in text
    assert "\x1b[" in text
